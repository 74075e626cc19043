"""A checkout of promptsource: how its templates are read, rendered, and turned into datasets."""

import json
import textwrap

import pytest

from m2l.data import promptsource
from m2l.data.promptsource import Template
from m2l.errors import DataError
from m2l.tasks import t0_held_in, t0_held_out, t0_templates

BASES = {base.name: base for base in (*t0_held_in.DATASETS, *t0_held_out.DATASETS)}

RTE = """
dataset: super_glue
subset: rte
templates:
  11111111-0000-0000-0000-000000000001: !Template
    answer_choices: Yes ||| No
    id: 11111111-0000-0000-0000-000000000001
    jinja: |-
      {{premise}} So {{hypothesis | lower}} {{ answer_choices | join(" or ") }}?
      ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: so… does it?
    reference: ''
  11111111-0000-0000-0000-000000000002: !Template
    answer_choices: null
    id: 11111111-0000-0000-0000-000000000002
    jinja: '{% if label == 0 %}What follows? {{premise}} ||| {{hypothesis}}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages: []
      metrics:
      - BLEU
      - ROUGE
      original_task: false
    name: what_follows
    reference: ''
  11111111-0000-0000-0000-000000000003: !Template
    answer_choices: null
    id: 11111111-0000-0000-0000-000000000003
    jinja: '{{premise}} ||| {{hypothesis}}'
    metadata: !TemplateMetadata
      languages:
      - de
      metrics:
      - Squad
      original_task: false
    name: auf_deutsch
    reference: ''
"""


def write(root, folder, text, within="templates"):
    path = root / within / folder / "templates.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(text))
    return path


def one(jinja, answer_choices=None, **more):
    return Template("some/set", "an-id", "a name", jinja, answer_choices, **more)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    write(tmp_path, "super_glue/rte", RTE)
    anli = RTE.replace("subset: rte\n", "").replace("super_glue", "anli")
    write(tmp_path, "anli", anli)
    monkeypatch.setenv("M2L_PROMPTSOURCE_DIR", str(tmp_path))
    return tmp_path


# Reading.


@pytest.mark.parametrize("within", ["templates", "promptsource/templates"])
def test_english_templates_are_read_with_what_is_said_of_them(tmp_path, within):
    write(tmp_path, "super_glue/rte", RTE, within)
    first, second = promptsource.templates(tmp_path, "super_glue/rte")
    assert (first.name, first.answer_choices) == ("so… does it?", "Yes ||| No")
    assert (first.original_task, first.metrics, first.languages) == (True, ("Accuracy",), ("en",))
    assert (second.name, second.answer_choices, second.original_task) == (
        "what_follows",
        None,
        False,
    )
    assert second.columns == {"label", "premise", "hypothesis"}
    assert first.columns == {"label", "premise", "hypothesis"}


def test_a_missing_variable_says_what_to_set(monkeypatch):
    monkeypatch.delenv("M2L_PROMPTSOURCE_DIR", raising=False)
    with pytest.raises(DataError, match=r"set M2L_PROMPTSOURCE_DIR to a checkout of https"):
        promptsource.checkout()


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: it has neither .* M2L_PROMPTSOURCE_DIR"):
        promptsource.templates(tmp_path, "imdb")


def test_a_missing_dataset_is_named_by_its_file(checkout):
    with pytest.raises(DataError, match=r"templates/imdb/templates\.yaml: it cannot be read"):
        promptsource.templates(checkout, "imdb")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", r"not YAML that can be used: ParserError"),
        ("templates: !!python/object/apply:os.getcwd []", r"ConstructorError"),
        ("templates: !Other {}", r"not YAML that can be used: ConstructorError"),
        ("[]", r"expected `templates`, a mapping"),
        ("templates: [1]", r"expected `templates`, a mapping"),
        ("templates: {x: 3}", r"template x: expected a mapping"),
        ("templates: {x: {metadata: 3}}", r"template x: expected a mapping"),
        ("templates: {x: {name: 1, jinja: a}}", r"template x: its name is not a text"),
        ("templates: {x: {name: a}}", r"template x: its jinja is not a text"),
        ("templates: {x: {name: a, jinja: b, answer_choices: 3}}", r"its answer_choices are not"),
        (
            "templates: {x: {name: a, jinja: b, metadata: {languages: en}}}",
            r"its languages are not a list",
        ),
        (
            "templates: {x: {name: a, jinja: b}, y: {name: a, jinja: c}}",
            r"2 templates have the name 'a'",
        ),
    ],
)
def test_a_file_that_is_not_promptsources_is_refused_in_one_line(tmp_path, text, says):
    path = write(tmp_path, "imdb", text)
    with pytest.raises(DataError, match=says) as raised:
        promptsource.templates(tmp_path, "imdb")
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("jinja", ["{{ a ||| b", "{% if a %} ||| b", "{{ a | shout }} ||| b"])
def test_what_is_not_a_template_is_refused_when_it_is_read(tmp_path, jinja):
    write(tmp_path, "imdb", json.dumps({"templates": {"x": {"name": "n", "jinja": jinja}}}))
    with pytest.raises(DataError, match=r"promptsource's imdb, template 'n': Template\w+Error"):
        promptsource.templates(tmp_path, "imdb")


# Rendering.


def test_an_example_is_prompt_target_and_choices_stripped():
    template = one(" {{q}}  {{ answer_choices[1] }}? |||  {{ answer_choices[a] }} ", "no ||| yes ")
    assert template.render({"q": "so", "a": 1}, 0) == {
        "inputs": "so  yes?",
        "targets": "yes",
        "answer_choices": ["no", "yes"],
    }
    assert one("{{q}} ||| 1").render({"q": "so"}, 0) == {"inputs": "so", "targets": "1"}


def test_choices_may_come_from_the_record_and_repeat():
    template = one('{{ c | join(", ") }} ||| {{ c[0] }}', '{{ c | join("|||") }}')
    example = template.render({"c": ["a", "b", "b"]}, 0)
    assert example == {"inputs": "a, b, b", "targets": "a", "answer_choices": ["a", "b"]}


@pytest.mark.parametrize(
    "jinja",
    ["{{q}} ||| ", " ||| {{q}}", "{{q}}", "", "{% if 0 %}a ||| b{% endif %}", "a ||| b ||| c"],
)
def test_records_that_t0_leaves_out_give_nothing(jinja):
    assert one(jinja).render({"q": "so"}, 0) is None


def test_a_separator_in_a_record_is_text_wherever_it_stands():
    template = one("{{q}} {{ d.e[0] }} {{answer_choices[0]}} ||| {{ d.e[1] }}", "{{d.e[1]}} ||| x")
    example = template.render({"q": "a|||b", "d": {"e": ["c|||d", "e|||f"]}}, 0)
    assert example == {
        "inputs": "a|||b c|||d e|||f",
        "targets": "e|||f",
        "answer_choices": ["e|||f", "x"],
    }


def test_hyphens_in_columns_are_underscores_in_templates():
    assert one("{{a_b_c}} ||| x").render({"a-b-c": "so"}, 0)["inputs"] == "so"


def test_long_texts_are_cut_at_a_word_and_answer_choices_are_not():
    words = "word " * 1000
    template = one("{{t}} {{t | length}} ||| {{answer_choices[1]}}", "{{t}} ||| x")
    example = template.render({"t": words}, 0)
    # Jinja's truncate: no more than 2048 characters, the three dots counted, whole words only.
    whole = (2048 - 3) // len("word ")
    assert example["inputs"] == ("word " * whole).rstrip() + "... 5000"
    assert example["answer_choices"] == [words.strip(), "x"]
    # It leaves five characters more alone.
    assert one("{{t}} ||| x").render({"t": "w" * 2053}, 0)["inputs"] == "w" * 2053


def test_zip_and_most_frequent_are_promptsources():
    template = one(
        "{% for x, y in zip(a, b) %}{{x}}{{y}} {% endfor %} ||| {{ a | most_frequent | join('+') }}"
    )
    example = template.render({"a": ["p", "q", "p", "r", "r"], "b": [1, 2, 3, 4, 5]}, 0)
    assert example == {"inputs": "p1 q2 p3 r4 r5", "targets": "p+r"}
    assert one("{{ a | most_frequent }} ||| x").render({"a": []}, 0)["inputs"] == "None"


def test_draws_depend_on_the_template_and_the_record_alone():
    jinja = "{{ a | choice }}{{ a | choice }} ||| {{ ['x', 'y'] | choice }}"
    template, again = one(jinja), one(jinja)
    record = {"a": list("abcdefgh")}
    drawn = [template.render(record, number) for number in range(200)]
    assert drawn == [again.render(record, number) for number in range(200)]
    texts = [example["inputs"] for example in drawn]
    assert len(set(texts)) > 40  # of 64 pairs: within a record, too, draws are independent
    assert {text[0] for text in texts} == {text[1] for text in texts} == set("abcdefgh")
    assert {example["targets"] for example in drawn} == {"x", "y"}
    other = Template("some/set", "another-id", "a name", jinja)
    assert [other.render(record, number) for number in range(200)] != drawn


@pytest.mark.parametrize(
    ("jinja", "says"),
    [
        ("{{ q.__class__ }} ||| x", "SecurityError"),
        ("{{ ''.__class__.__mro__ }} ||| x", "SecurityError"),
        ("{{ a.append(1) }} ||| x", "SecurityError"),
        ("{{ range(10**9) | length }} ||| x", "OverflowError"),
        ("{{ 1 // 0 }} ||| x", "ZeroDivisionError"),
        ("{{ [] | choice }} ||| x", "there is nothing to choose from"),
        ("{{ q + 1 }} ||| x", "TypeError"),
        ("{{ d.missing }} ||| x", "UndefinedError"),
        ("{{ missing }} ||| x", "there is no column 'missing'; it has q, a, d"),
        ("{% include 'x' %} ||| x", "TypeError"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_with_the_record(jinja, says):
    record = {"q": "so", "a": [], "d": {"e": 1}}
    with pytest.raises(DataError) as raised:
        one(jinja).render(record, 41)
    message = str(raised.value)
    assert message.startswith("promptsource's some/set, template 'a name', record 41: ")
    assert says in message
    assert "\n" not in message
    assert record == {"q": "so", "a": [], "d": {"e": 1}}


@pytest.mark.parametrize("choices", ["yes ||| no", "maybe"])
def test_a_target_that_is_not_one_of_two_choices_is_refused(choices):
    with pytest.raises(DataError, match=r"'maybe' is not one of two or more answer choices"):
        one("q ||| maybe", choices).render({}, 0)


def test_choices_that_are_not_ranked_only_help_to_write_the_texts():
    template = one("q ||| {{answer_choices[0]}} indeed", "yes ||| no", ranked=False)
    assert template.render({}, 0) == {"inputs": "q", "targets": "yes indeed"}


# Tasks.


def test_task_names_are_t0s():
    def name(base, template):
        return promptsource.task_name(BASES[base], Template("", "", template, ""))

    assert name("super_glue_rte", "GPT-3 style") == "super_glue_rte_GPT_3_style"
    assert name("anli_r2", "GPT-3 style") == "anli_GPT_3_style_r2"
    assert name("cnn_dailymail_3.0.0", "2_or_3_sentences") == "cnn_dailymail_3.0.0_2_or_3_sentences"
    assert name("wiki_qa", "Is This True?") == "wiki_qa_Is_This_True_"
    assert name("super_glue_copa", "…why? C1 or C2") == "super_glue_copa__why_C1_or_C2"


@pytest.mark.filterwarnings("ignore:.*has no templates of")
def test_every_template_of_a_declared_dataset_is_a_dataset_of_one_task(checkout):
    found = {dataset.name: dataset for dataset in t0_templates.datasets(checkout)}
    assert sorted(found) == sorted(
        [f"anli_{name}_r{r}" for r in "123" for name in ("so_does_it_", "what_follows")]
        + ["super_glue_rte_so_does_it_", "super_glue_rte_what_follows"]
    )
    ranked, written = (found[f"super_glue_rte_{name}"] for name in ("so_does_it_", "what_follows"))
    assert ranked.prompts[0].metrics == ("accuracy",)
    assert ranked.prompts[0].original_task
    assert "answer_choices" in ranked.fields
    assert written.prompts[0].metrics == ("rouge", "bleu")
    assert not written.prompts[0].original_task
    for name, dataset in found.items():
        base = BASES["super_glue_rte" if "rte" in name else f"anli_{name[-2:]}"]
        assert (dataset.category, dataset.held_out) == (base.category, base.held_out)
        assert dataset.part_of == base.name
        assert dataset.splits.keys() == base.splits.keys()
        assert dataset.task_name(dataset.prompts[0]) == name


@pytest.mark.filterwarnings("ignore:.*has no templates of")
def test_a_dataset_gives_examples_of_its_bases_records_in_order(checkout):
    datasets = {dataset.name: dataset for dataset in t0_templates.datasets()}
    records = [
        {"premise": "It rains.", "hypothesis": "It Is wet.", "label": label} for label in (0, 1, -1)
    ]
    base, render = t0_templates.template(datasets["super_glue_rte_so_does_it_"])
    assert base is BASES["super_glue_rte"]
    prompt = "It rains. So it is wet. Yes or No?"
    assert list(render(records)) == [
        {"inputs": prompt, "targets": answer, "answer_choices": ["Yes", "No"]}
        for answer in ("Yes", "No")
    ]
    base, render = t0_templates.template(datasets["anli_what_follows_r2"])
    assert base is BASES["anli_r2"]
    assert list(render(records)) == [{"inputs": "What follows? It rains.", "targets": "It Is wet."}]
    assert t0_templates.columns(datasets["anli_what_follows_r2"]) == (
        "hypothesis",
        "label",
        "premise",
    )


def test_datasets_without_templates_are_told(checkout):
    with pytest.warns(UserWarning, match=r"has no templates of .*imdb.*: these datasets have no"):
        t0_templates._prompted.__wrapped__(checkout)


def test_a_checkout_without_any_of_the_datasets_is_refused(tmp_path):
    (tmp_path / "templates").mkdir()
    with pytest.raises(DataError, match=r"it has no templates of the declared datasets"):
        t0_templates.datasets(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no templates of")
def test_two_templates_that_would_be_one_task_are_refused(tmp_path):
    entries = {
        key: {"name": name, "jinja": "a ||| b"} for key, name in (("x", "a b"), ("y", "a-b"))
    }
    write(tmp_path, "imdb", json.dumps({"templates": entries}))
    with pytest.raises(DataError, match=r"'a-b' and .*'a b' both make imdb_a_b"):
        t0_templates.datasets(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no templates of")
def test_imdbs_negation_is_answered_in_free_text(tmp_path):
    entry = {
        "name": "Negation template for positive and negative",
        "jinja": "{{text}} ||| {{ answer_choices[label] }} review.",
        "answer_choices": "negative ||| positive",
    }
    write(tmp_path, "imdb", json.dumps({"templates": {"x": entry}}))
    (dataset,) = t0_templates.datasets(tmp_path)
    assert dataset.prompts[0].answer_choices is None
    _, render = t0_templates.template(dataset, tmp_path)
    assert list(render([{"text": "bad", "label": 0}])) == [
        {"inputs": "bad", "targets": "negative review."}
    ]
