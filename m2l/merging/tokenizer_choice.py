"""Which tokenizer a merge's result gets, and what the rows of its tokens are made of, as data."""

import dataclasses
import re
from collections.abc import Mapping

from m2l.errors import MergeError, UnknownNameError
from m2l.typing import JsonObject

BASE, UNION, ZERO, AUTO = "base", "union", "zero", "auto"
_EXPERT = re.compile(r"expert_\d+")


def is_model(name: object) -> bool:
    """Returns whether a text is the name of one of a merge's models: base, or expert_0, ..."""
    return isinstance(name, str) and (name == BASE or bool(_EXPERT.fullmatch(name)))


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """What a token's rows are in models that lack it.

    Attributes:
        source: "base", "expert_0", ... or "zero".
        token: A token of that model's, or its id; None: the token itself.
        force: Whether models that have the token take these rows as well.
    """

    source: str
    token: str | int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not (is_model(self.source) or self.source == ZERO):
            raise UnknownNameError("source of a token", str(self.source), (BASE, "expert_0", ZERO))
        if self.token is not None and (self.source == ZERO or isinstance(self.token, bool)):
            raise MergeError(f"a token of {self.source} cannot be {self.token!r}")

    def to_dict(self) -> JsonObject:
        """Returns it as JSON-like data, without what is the default."""
        values = {"source": self.source, "token": self.token, "force": self.force}
        return {name: value for name, value in values.items() if value not in (None, False)}


@dataclasses.dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer the result gets, and how rows of embeddings and outputs follow it.

    Attributes:
        source: "base": the base's tokenizer, or the first expert's where there is no base;
            "expert_0", ...: that expert's; "union": the base's and all tokens that it lacks.
        tokens: What tokens' rows are made of, where that is not to follow from who has them; a
            token that the tokenizer lacks is added to it.
        pad_to: The number of rows is rounded up to a multiple of this.
        chat_template: "auto": the models' most frequent one; "base", "expert_0", ...: that model's;
            or a template. None: the one that comes with the tokenizer.

    Raises:
        MergeError: A value is of the wrong type or out of range.
        UnknownNameError: There is no such source.
    """

    source: str
    tokens: tuple[tuple[str, TokenSource], ...] = ()
    pad_to: int = 1
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not (is_model(self.source) or self.source == UNION):
            raise UnknownNameError("tokenizer", str(self.source), (BASE, UNION, "expert_0"))
        if type(self.pad_to) is not int or not 1 <= self.pad_to <= 1 << 20:
            raise MergeError(f"pad_to {self.pad_to!r}: a whole number from 1 was expected")
        template = self.chat_template
        if not (template in (None, AUTO) or is_model(template) or "{" in str(template)):
            raise MergeError(
                f"chat_template {template!r:.80}: expected {AUTO}, {BASE}, expert_0, ... or a "
                "template"
            )

    @classmethod
    def checked(
        cls, value: "TokenizerChoice | Mapping[str, object] | str | None"
    ) -> "TokenizerChoice | None":
        """Returns the choice that a name, or JSON-like data, means; errors as the class's."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise MergeError(f"tokenizer must be a name or an object, not {value!r:.80}")
        for name in value:
            if name not in known:
                raise UnknownNameError("setting of the tokenizer", str(name), known)
        tokens = value.get("tokens") or {}
        try:
            sources = tuple((str(token), TokenSource(**each)) for token, each in tokens.items())
        except (AttributeError, TypeError) as error:
            raise MergeError(f"tokenizer: tokens cannot be read ({error})") from error
        return cls(**{"source": UNION, **value, "tokens": sources})

    def to_dict(self) -> JsonObject:
        """Returns it as JSON-like data, without what is the default."""
        values: JsonObject = {"source": self.source}
        if self.tokens:
            values["tokens"] = {token: source.to_dict() for token, source in self.tokens}
        if self.pad_to > 1:
            values["pad_to"] = self.pad_to
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        return values
