"""Renders templates that others wrote, in a process with limits on time and memory.

`m2l.data.jinja_rendering` runs this file as a program, and asks it through pipes: pickles come in,
JSON goes out. A template is a program: it may loop for ever, or fill the memory in one operation
of C's, which nothing within the same process can stop. It needs nothing of m2l, so that it starts
fast.
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import pickle
import resource
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping

import jinja2
import jinja2.ext
from jinja2.filters import do_truncate
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What one request may take. A rendering takes about 0.1 ms, compiling a template some ms.
SECONDS = 1.0
MEMORY = 512 * 2**20
# A rendering has at most so many characters, and ten for each of what is filled in.
CHARACTERS, CHARACTERS_EACH = 1_000_000, 10

# promptsource cuts whatever it fills in to so many characters, at the end of a word.
MAX_CHARACTERS = 2048
_SEPARATOR = "|||"
# Stands for the separator where a record's own text has it: characters that no text should have.
_IN_A_TEXT = "\ue000\ue001\ue000"
# The name under which a rendering keeps count of its draws; no template can write it.
_DRAW = "the next draw"


def _check_size(rendered: str, filled_in: int) -> str:
    most = CHARACTERS + CHARACTERS_EACH * filled_in
    if len(rendered) > most:
        raise ValueError(f"it writes {len(rendered)} characters, and may write {most}")
    return rendered


def _without_chance(environment: ImmutableSandboxedEnvironment) -> None:
    """Takes away what writes something else at each call."""
    del environment.filters["random"], environment.globals["lipsum"]


# ---- Chat templates


class _Generation(jinja2.ext.Extension):
    """{% generation %}, by which transformers tells an answer's tokens: here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, ensure_ascii: bool = False, **options: object) -> str:
    # Jinja's own would escape what HTML reserves.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=8)
def _chat_template(source: str, date: datetime.date) -> jinja2.Template:
    """Compiles a template as transformers does, with the same functions, but for the clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    _without_chance(environment)
    now = datetime.datetime.combine(date, datetime.time())
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source)


def chat(
    source: str,
    special_tokens: Mapping[str, str],
    date: datetime.date,
    messages: list[dict[str, str]],
    goes_on: bool = False,
) -> str:
    """Renders a chat template for a conversation, up to where its next message begins.

    Args:
        source: The template.
        special_tokens: Text by role.
        date: What `strftime_now` says it is, at midnight.
        messages: {"role", "content"} of each.
        goes_on: Whether instead the last message is continued: nothing is rendered behind it.
    """
    rendered = _chat_template(source, date).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=not goes_on,
        **special_tokens,
    )
    if goes_on:
        last = messages[-1]["content"]
        place = rendered.rfind(last.strip())
        if place < 0:
            _raise("it does not write the last message as it is, so that none can continue it")
        # Some templates strip messages.
        whole = rendered.startswith(last, place)
        rendered = rendered[: place + len(last if whole else last.strip())]
    return _check_size(rendered, sum(len(message["content"]) for message in messages))


# ---- promptsource's templates


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Iterable[object]) -> object:
    return context.get(_DRAW)(list(items))


def _most_frequent(items: Iterable[Hashable]) -> list[object] | None:
    """Returns all items as often there as the most frequent one, in the order they come in."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most] or None


def _environment(finalize: Callable[[object], object] | None) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=finalize)
    _without_chance(environment)
    environment.filters.update(choice=_choice, random=_choice, most_frequent=_most_frequent)
    environment.globals.update(zip=zip)
    return environment


_CHOICES = _environment(None)
_TEXTS = _environment(lambda value: do_truncate(_CHOICES, str(value), MAX_CHARACTERS))


@functools.lru_cache(maxsize=4096)
def _promptsource_template(source: str, is_choices: bool) -> jinja2.Template:
    return (_CHOICES if is_choices else _TEXTS).from_string(source)


def columns(text: str, choices: str | None) -> list[str]:
    """Compiles a template; returns the columns that it names.

    Args:
        text: The prompt, the separator and the target.
        choices: The answer choices with the separator between them.
    """
    sources = [(text, False)] + ([] if choices is None else [(choices, True)])
    for source, is_choices in sources:
        _promptsource_template(source, is_choices)
    names = (find_undeclared_variables(_CHOICES.parse(source)) for source, _ in sources)
    return sorted(set(itertools.chain(*names)) - {"answer_choices"} - set(_CHOICES.globals))


def _protected(value: object) -> object:
    """Replaces the separator in all texts of a value."""
    if isinstance(value, str):
        return value.replace(_SEPARATOR, _IN_A_TEXT)
    if isinstance(value, Mapping):
        return {name: _protected(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_protected(item) for item in value]
    return value


def _parts(rendered: str) -> list[str]:
    parts = (part.replace(_IN_A_TEXT, _SEPARATOR).strip() for part in rendered.split(_SEPARATOR))
    return list(parts)


def promptsource(
    text: str, choices: str | None, values: Mapping[str, object], seed: str
) -> tuple[list[str], list[str] | None]:
    """Renders a template for a record.

    Args:
        text: The prompt, the separator and the target.
        choices: The answer choices with the separator between them.
        values: The record's columns.
        seed: Decides what is drawn at random.

    Returns:
        The parts between the text's separators, and the choices, all stripped.
    """
    draws, characters = itertools.count(), len(str(values))

    def draw(items: list[object]) -> object:
        if not items:
            raise IndexError("there is nothing to choose from")
        digest = hashlib.blake2b(f"{seed}/{next(draws)}".encode(), digest_size=8).digest()
        return items[int.from_bytes(digest, "little") % len(items)]

    def render(source: str, is_choices: bool) -> list[str]:
        rendered = _promptsource_template(source, is_choices).render(values)
        return _parts(_check_size(rendered, characters))

    values = {**_protected(values), _DRAW: draw}
    rendered_choices = None if choices is None else render(choices, True)
    # As in a record's text, a separator within a choice is not one.
    values["answer_choices"] = _protected(rendered_choices)
    return render(text, False), rendered_choices


# ---- The process


def _limit(name: int, most: int) -> None:
    _, hard = resource.getrlimit(name)
    resource.setrlimit(name, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(request: bytes) -> bytes:
    """Returns the JSON of {"result"}, or of {"error": [the exception's class, its message]}."""
    try:
        name, arguments = pickle.loads(request)
        functions = {"chat": chat, "columns": columns, "promptsource": promptsource}
        return json.dumps({"result": functions[name](*arguments)}).encode()
    except Exception as error:  # A template is someone's program: it may raise anything.
        error.__traceback__ = None  # and with it what filled the memory
        return json.dumps({"error": [type(error).__name__, str(error)[:1000]]}).encode()


def main() -> None:
    """Answers requests until there are no more; SIGPROF ends one that takes too long."""
    _limit(resource.RLIMIT_DATA, MEMORY)
    # Read-only files count to this one as well.
    _limit(resource.RLIMIT_AS, 3 * MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while header := requests.read(8):
        request = requests.read(*struct.unpack("<Q", header))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(struct.pack("<Q", len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
