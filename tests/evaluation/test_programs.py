"""The toy language against programs written and worked out by hand, and against nonsense."""

import random

import pytest

from m2l.evaluation import programs

BY_HAND = [
    ("more 3", (1, 2), (4, 5)),
    ("less 2 then times 3", (1, 5), (-3, 9)),
    ("over 3", (1, 3, 4, 9), (4, 9)),
    ("under 3", (1, 3, 4, 2), (1, 2)),
    ("first 2 then turn", (7, 8, 9), (8, 7)),
    ("last 2", (7, 8, 9), (8, 9)),
    ("last 0", (7, 8, 9), ()),
    ("last 5", (7, 8), (7, 8)),
    ("first 0 then sum", (7, 8), (0,)),
    ("put 4 then sort", (9, 1), (1, 4, 9)),
    ("sum then put 1", (2, 3), (5, 1)),
    ("repeat 3 do put 1 end", (2,), (2, 1, 1, 1)),
    ("repeat 0 do sum end", (2, 3), (2, 3)),
    ("repeat 2 do repeat 2 do more 1 end then times 2 end", (0, 1), (12, 16)),
    ("while over 5 do less 2 end", (10, 6), (4, 0)),
    ("while under 5 do more 2 end then sum", (1, 1), (10,)),
    ("while over 5 do less 2 end", (), ()),
    ("while over 5 do first 0 end", (9,), ()),
]


@pytest.mark.parametrize(("text", "given", "expected"), BY_HAND)
def test_a_program_does_what_it_says(text, given, expected):
    assert programs.run(programs.parse(text), given) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "more",
        "more x",
        "more -1",
        "more 12345",
        "more \u0663",
        "turn 3",
        "sort then",
        "then sort",
        "sort sort",
        "SORT",
        "repeat 2 do end",
        "repeat 2 do sort",
        "repeat 2 sort end",
        "while 3 do sort end",
        "sort end",
        "__import__('os')",
        " then ".join(["sort"] * 101),
        "repeat 1 do " * 7 + "sort" + " end" * 7,
    ],
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(programs.ProgramError):
        programs.parse(text)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("while over 0 do more 0 end", (1,)),
        ("while over 0 do turn end", (1, 2)),
        ("while under 5 do less 1 end", (1,)),
        ("repeat 9999 do sort end", (1,)),
        ("repeat 9999 do repeat 9999 do repeat 9999 do sort end end end", (1,)),
        ("repeat 200 do put 1 end", (1,)),
        ("repeat 50 do times 9 end", (2,)),
        ("while over 0 do while over 9 do sort end end", (5,)),
    ],
)
def test_a_program_that_goes_too_far_is_stopped(text, given):
    with pytest.raises(programs.ProgramError):
        programs.run(programs.parse(text), given)


def test_a_program_is_written_as_it_is_parsed():
    for text, _, _ in BY_HAND:
        assert programs.unparse(programs.parse(text)) == text


def test_every_text_of_its_words_is_a_program_that_ends_or_is_refused():
    rng = random.Random(0)
    words = [*programs.OPERATIONS, "repeat", "while", "do", "end", "then", *"0123456789", "999"]
    ran = 0
    for _ in range(20000):
        text = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        try:
            program = programs.parse(text)
            assert programs.parse(programs.unparse(program)) == program
            made = programs.run(program, [rng.randint(-9, 9) for _ in range(rng.randint(0, 6))])
        except programs.ProgramError:
            continue
        ran += 1
        assert all(type(value) is int for value in made)
    assert ran > 100


def test_a_test_case_is_a_list_and_what_is_made_of_it():
    assert programs.parse_case("3 1 2 -> 4 2") == ((3, 1, 2), (4, 2))
    assert programs.parse_case("3 -> ") == ((3,), ())
    for text in ("3 1 2", "3 -> x", "-> ->"):
        with pytest.raises(ValueError):
            programs.parse_case(text)
