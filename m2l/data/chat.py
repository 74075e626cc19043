"""Chat templates: how a model that was taught to chat wants its prompts written."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from m2l.data.tokenizer_files import read_settings
from m2l.errors import DataError


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may name.

    Attributes:
        source: The Jinja template.
        special_tokens: Text by role: {"bos_token": "<s>"}.
        where: The directory it is from, for messages.
    """

    source: str
    special_tokens: Mapping[str, str]
    where: str

    def render(self, text: str) -> str:
        """The prompt of a conversation in which the user has said `text`, up to the answer.

        Equal to transformers' apply_chat_template(..., add_generation_prompt=True).

        Raises:
            DataError: the template fails.
        """
        try:
            return _compiled(self.source).render(
                messages=[{"role": "user", "content": text}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except Exception as error:  # whatever a template of someone else's may do
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.where}: its chat template fails ({reason:.200})") from error


def read(directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """The chat template of a tokenizer's directory: chat_template.jinja, else the settings' own.

    Raises:
        DataError: there is none, or several and none of them the default.
    """
    if (file := directory / "chat_template.jinja").is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, str(directory))
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
    return ChatTemplate(source, special_tokens, str(directory))


class _Generation(jinja2.ext.Extension):
    """{% generation %}, by which transformers tells an answer's tokens: here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """As transformers compiles it: the same trimming, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda wanted: datetime.datetime.now().strftime(wanted)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own would escape what HTML reserves.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
