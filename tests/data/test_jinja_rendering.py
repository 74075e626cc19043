"""Templates of others: what they may take, and that the process behind them goes on."""

import concurrent.futures
import datetime
import subprocess
import sys

import pytest

from m2l.data import jinja_rendering, promptsource
from m2l.data.chat import ChatTemplate
from m2l.errors import DataError

DOUBLING = "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = REST %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": (ENDLESS, "more than 1 s of computing"),
    "a filter's loop": ("{{ range(99999) | list | batch(10**12, 0) | list }}", ""),
    "calls": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a loop of itself": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    "times": ("{{ 'x' * 10**12 }}", "MemoryError"),
    "list times": ("{{ [0] * 10**10 }}", "MemoryError"),
    "width": ("{{ '%999999999d' % 1 }}", "MemoryError"),
    "format": ("{{ '{:999999999}'.format(1) }}", "MemoryError"),
    "center": ("{{ 'x' | center(10**11) }}", "MemoryError"),
    "doubling": (DOUBLING.replace("REST", "s.x ~ s.x"), "MemoryError"),
    "large power": ("{{ (10 ** (10 ** 8)) % 7 }}", "more than 1 s of computing"),
    "long output": (
        "{% for i in range(99999) %}twelve times{% endfor %}",
        "characters, and may write 10000",
    ),
    "deep expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "deep blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "recursion"),
    "many signs": ("{{ " + "-" * 100_000 + "1 }}", "recursion"),
    "digits": ("{{ 10 ** 5000 }}", "4300 digits"),
}


def chat(source):
    return ChatTemplate(source, {}, "dir")


@pytest.mark.parametrize(("source", "reason"), BOMBS.values(), ids=BOMBS)
def test_a_chat_template_that_takes_too_much_is_refused_and_the_next_one_rendered(source, reason):
    with pytest.raises(DataError) as raised:
        chat(source).render("x")
    message = str(raised.value)
    assert message.startswith("dir: its chat template fails (") and reason in message
    assert "\n" not in message and len(message) < 300
    assert chat("{{ messages[0].content }}!").render("x") == "x!"


@pytest.mark.parametrize("name", ["loops", "times", "deep expression", "long output"])
def test_promptsources_templates_have_the_same_limits(name):
    source, reason = BOMBS[name]
    with pytest.raises(DataError, match=r"^promptsource's f, template 'n'") as raised:
        promptsource.Template("f", "i", "n", source + " ||| y").render({}, 0)
    assert reason in str(raised.value)
    # The choices are a template as well.
    with pytest.raises(DataError, match=r"^promptsource's f, template 'n'"):
        promptsource.Template("f", "i", "n", "x ||| y", source).render({}, 0)


def test_a_long_text_may_be_rendered_to_as_many_characters():
    text = "word " * 600_000
    assert chat("{{ messages[0].content }}").render(text) == text


@pytest.mark.parametrize("source", ["{{ [1, 2] | random }}", "{{ lipsum() }}", "{{ now() }}"])
def test_what_differs_from_call_to_call_is_not_there(source):
    with pytest.raises(DataError, match=r"random|lipsum|now"):
        chat(source).render("x")


def test_promptsources_random_draws_by_the_record_as_its_choice_does():
    a, b = (
        promptsource.Template("f", "i", "n", f"{{{{ a | {name} }}}} ||| y")
        for name in ("random", "choice")
    )
    record = {"a": list(range(50))}
    drawn = [a.render(record, number)["inputs"] for number in range(20)]
    assert drawn == [b.render(record, number)["inputs"] for number in range(20)]
    assert len(set(drawn)) > 5


def test_a_template_is_told_its_own_date_at_midnight():
    source = "{{ strftime_now('%A %d %b %Y %H:%M:%S.%f') }}"
    assert chat(source).reads_date and not chat("{{ 1 }}").reads_date
    assert chat(source).render("x") == "Friday 26 Jul 2024 00:00:00.000000"
    other = ChatTemplate(source, {}, "dir", datetime.date(2025, 1, 31))
    assert other.render("x") == "Friday 31 Jan 2025 00:00:00.000000"


def test_threads_get_their_own_answers():
    template = chat("{{ messages[0].content * 3 }}")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [str(number) for number in range(200)]
        assert list(pool.map(template.render, texts)) == [text * 3 for text in texts]


def test_a_forked_process_has_a_worker_of_its_own():
    # In a process without JAX's threads, which do not bear a fork.
    program = """
import os
from m2l.data.chat import ChatTemplate
template = ChatTemplate("{{ messages[0].content * 3 }}", {}, "dir")
assert template.render("x") == "xxx"
read, write = os.pipe()
if not os.fork():
    os.write(write, template.render("child ").encode())
    os._exit(0)
assert os.read(read, 100) == b"child child child "
assert template.render("y") == "yyy"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_unknown_function_is_an_error_of_the_callers():
    with pytest.raises(jinja_rendering.TemplateError, match="KeyError: 'other'"):
        jinja_rendering.call("other")
