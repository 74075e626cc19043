"""Chat templates: the form of the prompts that a model was taught to chat by."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2l.data.tokenizer_files import read_settings
from m2l.errors import DataError

# The date that Llama 3.2's template writes where it is given no clock.
DATE = datetime.date(2024, 7, 26)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may name.

    Attributes:
        source: The Jinja template.
        special_tokens: Text by role: {"bos_token": "<s>"}.
        directory: The directory it is from, for messages.
        date: What day the template is told it is: prompts must not change from one to the next.
    """

    source: str
    special_tokens: Mapping[str, str]
    directory: str
    date: datetime.date = DATE

    @property
    def reads_date(self) -> bool:
        """Whether the template asks what day it is."""
        return "strftime_now" in self.source

    def render(self, text: str) -> str:
        """Renders the prompt of a conversation in which the user has said `text`, up to the answer.

        Raises:
            DataError: as `render_messages` says.
        """
        return self.render_messages([{"role": "user", "content": text}])

    def render_messages(self, messages: Sequence[Mapping[str, str]], goes_on: bool = False) -> str:
        """Renders a conversation up to the answer.

        Equal to transformers' apply_chat_template(..., add_generation_prompt=True) on `date`, at
        midnight. It is rendered in a process of its own, see `jinja_worker` for the limits.

        Args:
            messages: {"role": ..., "content": ...} of each.
            goes_on: Whether the last message is the beginning of the answer, as with transformers'
                continue_final_message=True.

        Raises:
            DataError: the template fails, draws at random, or takes too much time or memory.
        """
        # Most vocabularies have no template, and Jinja takes a tenth of a second to import.
        from m2l.data import jinja_rendering

        conversation = [dict(message) for message in messages]
        arguments = self.source, dict(self.special_tokens), self.date, conversation, goes_on
        try:
            return jinja_rendering.call("chat", *arguments)
        except jinja_rendering.TemplateError as error:
            raise DataError(
                f"{self.directory}: its chat template fails ({error.message:.200})"
            ) from error


def read(
    directory: Path, special_tokens: Mapping[str, str], date: datetime.date = DATE
) -> ChatTemplate:
    """Reads a tokenizer's chat template: chat_template.jinja, else the one in its settings.

    Args:
        directory: The tokenizer's.
        special_tokens: Text by role.
        date: What day the template is told it is.

    Raises:
        DataError: there is none, or several and none of them the default.
    """
    if (file := directory / "chat_template.jinja").is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, str(directory), date)
    file = directory / "tokenizer_config.json"
    source = read_settings(file).get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
        if source is None:
            raise DataError(f"{file}: none of its chat templates {sorted(named)} is the default")
    if not isinstance(source, str):
        raise DataError(
            f"{directory}: no chat template, neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json; leave chat: out"
        )
    return ChatTemplate(source, special_tokens, str(directory), date)
