"""A checkpoint's own tokenizer: equal ids in the graph and outside, joint texts, chat, refusals."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tokenizers

from m2l import tasks
from m2l.data import examples, pipeline, tokenizer_files, vocabularies
from m2l.data.seqio_vocabularies import as_seqio
from m2l.errors import DataError

ODD = [
    "",
    " ",
    "\n",
    "the cat of mara eats fish.",
    " leading and trailing ",
    "two  spaces,\tand\r\na line\n",
    "日本語の文, e\u0301 ﬁ ½, 😀👩‍🚀",
    "null bytes \x00 in it and behind it\x00",
    "<|im_start|>user\nhello <|endoftext|><unk>",
]
DIRECTORIES = ["byte_level", "llama", "llama_pieces", "t5", "mt5"]


def described(name):
    return vocabularies.describe(vocabularies.load(str(name)), str(name))


@pytest.fixture
def edited(made_tokenizers, tmp_path):
    """A copy of a tokenizer's directory with other settings; a setting of None is left out."""

    def edit(kind, **settings):
        directory = tmp_path / "edited"
        shutil.copytree(made_tokenizers / kind, directory, dirs_exist_ok=True)
        file = directory / "tokenizer_config.json"
        content = json.loads(file.read_text()) | settings
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return directory

    return edit


@pytest.mark.parametrize("name", [*DIRECTORIES, "chat:byte_level", "chat:llama"])
@pytest.mark.parametrize("targets", [False, True])
def test_the_graph_gives_the_same_ids_and_texts(made_tokenizers, name, targets):
    chat, kind = name.startswith("chat:"), name.removeprefix("chat:")
    vocabulary = vocabularies.load("chat:" * chat + str(made_tokenizers / kind))
    vocabulary = vocabularies.continuing(vocabulary) if targets else vocabulary
    seqios = as_seqio(vocabulary)
    in_graph = tf.data.Dataset.from_tensor_slices(ODD).map(seqios.encode_tf)
    assert in_graph.element_spec.shape.as_list() == [None]
    assert in_graph.element_spec.dtype == tf.int32
    for text, ids in zip(ODD, in_graph.as_numpy_iterator(), strict=True):
        assert ids.tolist() == vocabulary.encode(text)
        assert seqios.encode(text) == seqios.encode_tf(tf.constant(text)).numpy().tolist()
        # SentencePiece's own two decoders differ in the white space at a text's ends.
        if len(ids) and kind in ("byte_level", "llama"):
            decoded = seqios.decode_tf(tf.constant(ids)).numpy()
            assert decoded.decode() == vocabulary.decode(ids.tolist())
            dataset = tf.data.Dataset.from_tensors(ids).map(seqios.decode_tf)
            assert next(dataset.as_numpy_iterator()) == decoded


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@pytest.mark.parametrize("targets", [False, True])
def test_text_comes_back_exactly(made_tokenizers, kind, targets):
    vocabulary = vocabularies.load(str(made_tokenizers / kind))
    vocabulary = vocabularies.continuing(vocabulary) if targets else vocabulary
    for text in ODD:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode([*ids, vocabulary.eos_id, 0, 0]) == text


def test_rows_decode_up_to_their_ends(made_tokenizers):
    vocabulary = vocabularies.load(str(made_tokenizers / "byte_level"))
    words = [vocabulary.encode("cat"), vocabulary.encode("a fish")]
    rows = np.zeros((2, 12), np.int32)
    for row, ids in zip(rows, words, strict=True):
        row[: len(ids)], row[len(ids)] = ids, vocabulary.eos_id
    assert as_seqio(vocabulary).decode_tf(tf.constant(rows)).numpy().tolist() == [b"cat", b"a fish"]
    assert vocabulary.decode([*words[0], vocabulary.vocab_size + 5]) == "cat"


def test_special_tokens_written_in_a_text_are_recognised(made_tokenizers):
    assert vocabularies.load(str(made_tokenizers / "byte_level")).encode("<|im_start|>") == [1]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "llama_pieces"])
def test_inputs_and_targets_encoded_apart_are_the_joint_text(made_tokenizers, kind):
    vocabulary = vocabularies.load(str(made_tokenizers / kind))
    targets = vocabularies.continuing(vocabulary)
    for inputs in ("the cat eats", "Is it good?\n\nAnswer:", "日本", "x\ny"):
        for target in ("fish", "no, 42", "42", "😀", "yes or no?\nyes"):
            apart = vocabulary.encode(inputs) + targets.encode(target)
            assert apart == vocabulary.encode(f"{inputs} {target}")
    assert targets.encode("") == []
    assert targets.eos_id == vocabulary.eos_id
    assert targets.vocab_size == vocabulary.vocab_size
    assert vocabularies.start_id(targets) == vocabularies.start_id(vocabulary)
    name = str(made_tokenizers / kind)
    assert vocabularies.describe(targets, name) == vocabularies.describe(vocabulary, name)


def test_t5_vocabularies_encode_targets_as_they_are(made_tokenizers):
    for name in ("microworld", "bytes", str(made_tokenizers / "t5"), str(made_tokenizers / "mt5")):
        vocabulary = vocabularies.load(name)
        assert vocabularies.continuing(vocabulary) is vocabulary
        assert vocabularies.start_id(vocabulary) == 0


def test_pieces_that_reach_over_spaces_are_refused_for_targets(tmp_path):
    model = tokenizers.models.BPE(
        {"a": 0, "b": 1, " ": 2, "a ": 3, "</s>": 4, "a b": 5}, [("a", " "), ("a ", "b")]
    )
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"reach over the space.* put space: or nospace: before"):
        vocabularies.continuing(vocabularies.load(str(tmp_path)))
    apart = vocabularies.continuing(vocabularies.load(f"nospace:{tmp_path}"))
    assert apart.encode("b") == [1]


def test_llamas_pieces_and_its_tokenizer_json_give_the_same_ids(made_tokenizers):
    pieces, tokenizer = (
        vocabularies.load(str(made_tokenizers / kind)) for kind in ("llama_pieces", "llama")
    )
    for text in ODD[:-1]:  # without special tokens, which SentencePiece does not look for
        assert pieces.encode(text) == tokenizer.encode(text)
    assert pieces.eos_id == tokenizer.eos_id == 2
    assert vocabularies.start_id(pieces) == vocabularies.start_id(tokenizer) == 1
    assert pieces.vocab_size == tokenizer.vocab_size
    file = str(made_tokenizers / "llama_pieces" / "tokenizer.model")
    assert vocabularies.load(file) == pieces


def test_a_row_starts_with_what_the_tokenizer_adds_unless_its_settings_say_otherwise(edited):
    for settings, wanted in (
        ({}, 1),
        ({"add_bos_token": False}, None),
        ({"add_bos_token": True, "bos_token": "</s>"}, 2),
        ({"add_bos_token": True, "bos_token": None}, None),
    ):
        assert vocabularies.start_id(vocabularies.load(str(edited("llama", **settings)))) == wanted
    directory = str(edited("byte_level", add_bos_token=True))
    assert vocabularies.start_id(vocabularies.load(directory)) == 1
    directory = str(edited("llama_pieces", add_bos_token=False))
    assert vocabularies.start_id(vocabularies.load(directory)) is None


def test_the_end_of_a_text_is_looked_for_in_every_settings_file(edited):
    directory = edited("byte_level", eos_token=None)
    with pytest.raises(DataError, match=r"which token ends a text.*eos_token.*tokenizer_config"):
        vocabularies.load(str(directory))
    for file, content, wanted in (
        ("config.json", {"eos_token_id": 7}, 7),
        ("generation_config.json", {"eos_token_id": [5, 6]}, 5),
        ("special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}}, 0),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, 2),
    ):
        (directory / file).write_text(json.dumps(content))
        assert vocabularies.load(str(directory)).eos_id == wanted


def test_a_vocabulary_is_equal_by_content_and_survives_copying(made_tokenizers, edited):
    load = vocabularies.load
    vocabulary = load(str(made_tokenizers / "byte_level"))
    chat = load(f"chat:{made_tokenizers / 'byte_level'}")
    for one in (vocabulary, chat, vocabularies.continuing(vocabulary)):
        for same in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert same == one
            assert hash(same) == hash(one)
            assert same.encode("the cat") == one.encode("the cat")
    assert load(str(edited("byte_level"))) == vocabulary != chat
    assert load(str(edited("byte_level", eos_token="<|endoftext|>"))) != vocabulary
    assert load(str(made_tokenizers / "llama")) != vocabulary


def test_a_fingerprint_is_of_the_ids_not_of_how_the_file_is_written(made_tokenizers, edited):
    directory = edited("byte_level")
    before = described(directory)
    assert before == described(made_tokenizers / "byte_level") | {"name": str(directory)}
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["model"].pop("ignore_merges")  # a setting that older versions did not write
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["post_processor"] = None
    file.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert described(directory) == before
    assert len(vocabularies.load(str(directory)).encode("the cat of mara eats")) > 3
    content["model"]["merges"].reverse()
    file.write_text(json.dumps(content))
    assert described(directory)["fingerprint"] != before["fingerprint"]


def test_a_fingerprint_covers_the_ends_of_a_text(edited):
    prints = {
        described(edited("llama", **settings))["fingerprint"]
        for settings in ({}, {"add_bos_token": False}, {"eos_token": "<unk>"})
    }
    assert len(prints) == 3


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_files_are_described_the_same_without_a_vocabulary(made_tokenizers, kind):
    assert tokenizer_files.describe(str(made_tokenizers / kind)) == described(
        made_tokenizers / kind
    )
    vocabulary = vocabularies.load(str(made_tokenizers / kind))
    assert described(made_tokenizers / kind)["size"] == vocabulary.vocab_size


def test_describing_files_loads_neither_seqio_nor_tensorflow(made_tokenizers):
    code = (
        "import sys\nfrom m2l.data import tokenizer_files\n"
        "for name in sys.argv[1:]: tokenizer_files.describe(name)\n"
        "print(sorted({'seqio', 'tensorflow'} & set(sys.modules)))"
    )
    names = ["microworld", "bytes", *(str(made_tokenizers / kind) for kind in DIRECTORIES)]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_directory_is_its_main_file(made_tokenizers):
    for kind, file in (
        ("t5", "spiece.model"),
        ("byte_level", "tokenizer.json"),
        ("llama_pieces", "tokenizer.model"),
    ):
        whole = described(made_tokenizers / kind)
        alone = described(made_tokenizers / kind / file)
        assert alone == whole | {"name": str(made_tokenizers / kind / file)}


def test_links_are_read_by_their_own_names(made_tokenizers, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(
        shutil.copy(made_tokenizers / "byte_level" / "tokenizer.json", tmp_path / "blob")
    )
    shutil.copy(made_tokenizers / "byte_level" / "tokenizer_config.json", tmp_path)
    assert vocabularies.load(str(tmp_path)).eos_id == 2


def test_sentinels_that_are_pieces_are_not_added_again(made_tokenizers):
    assert vocabularies.load(str(made_tokenizers / "t5")).extra_ids == 100
    own = vocabularies.load(str(made_tokenizers / "mt5"))
    assert own.extra_ids == 0
    assert own.vocab_size == own.files.processor().GetPieceSize()


def test_a_chats_prompt_is_rendered_by_its_template(made_tokenizers):
    name = f"chat:{made_tokenizers / 'byte_level'}"
    vocabulary = vocabularies.load(name)
    plain = vocabularies.load(str(made_tokenizers / "byte_level"))
    prompt = (
        "<|im_start|>system\nBe kind<|im_end|>\n\n"
        "<|im_start|>user\nIs it good?<|im_end|>\n\n<|im_start|>assistant\n"
    )
    assert vocabulary.encode("Is it good?") == plain.encode(prompt)
    assert vocabularies.continuing(vocabulary).encode("yes") == plain.encode("yes")
    assert described(name)["name"] == name
    assert (
        described(name)["fingerprint"] == described(made_tokenizers / "byte_level")["fingerprint"]
    )


@pytest.mark.parametrize(
    ("goes_on", "strips", "written"),
    [
        (False, "", "[system]be brief[user]2 + 2? [assistant]It is 4 [assistant]"),
        (True, "", "[system]be brief[user]2 + 2? [assistant]It is 4 "),
        (True, " | trim", "[system]be brief[user]2 + 2?[assistant]It is 4"),
    ],
)
def test_a_conversation_is_rendered_up_to_its_next_message(edited, goes_on, strips, written):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content" + strips + " }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '' if add_generation_prompt else '!' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [("system", "be brief"), ("user", "2 + 2? "), ("assistant", "It is 4 ")]
    chat = vocabularies.load(f"chat:{edited('byte_level', chat_template=template)}").chat_template
    conversation = [{"role": role, "content": content} for role, content in messages]
    assert chat.render_messages(conversation, goes_on=goes_on) == written


def test_shots_are_turns_of_a_chat_and_one_text_elsewhere(made_tokenizers):
    directory = made_tokenizers / "byte_level"
    plain = vocabularies.load(str(directory))
    prompt = ("is it?", [("was it?", "yes"), ("will it be?", "no")])
    said = ("system", "Be kind"), ("user", "was it?"), ("assistant", "yes")
    said += ("user", "will it be?"), ("assistant", "no"), ("user", "is it?")
    turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said]
    written = "\n".join(turns) + "\n<|im_start|>assistant\n"
    for name, text in (
        (f"chat:{directory}", written),
        (str(directory), "was it? yes\n\nwill it be? no\n\nis it?"),
        (f"nospace:{directory}", "was it?yes\n\nwill it be?no\n\nis it?"),
    ):
        assert vocabularies.load(name).encode_few_shot([prompt]) == [plain.encode(text)]


def test_a_chat_is_told_a_date_that_does_not_change_but_by_the_name(edited):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    directory = edited("byte_level", chat_template=template)
    plain = vocabularies.load(str(directory))
    dated = {
        f"chat{day}:{directory}": f"{written} x"
        for day, written in (("", "26 Jul 2024"), ("@2025-01-31", "31 Jan 2025"))
    }
    loaded = [vocabularies.load(name) for name in dated]
    assert [one.encode("x") for one in loaded] == [plain.encode(text) for text in dated.values()]
    assert loaded[0] != loaded[1] and loaded[0] == vocabularies.load(next(iter(dated)))
    days = [vocabularies.settings(one)["chat_date"] for one in loaded]
    assert days == ["2024-07-26", "2025-01-31"]
    # A template that does not ask is not another by another date.
    undated = edited("byte_level", chat_template="{{ messages[0]['content'] }}")
    one, other = (vocabularies.load(f"chat{day}:{undated}") for day in ("", "@2025-01-31"))
    assert one == other and vocabularies.settings(one) == vocabularies.settings(plain) == {}


@pytest.mark.parametrize("kind", ["byte_level", "llama", "llama_pieces"])
def test_a_name_says_whether_a_space_stands_before_targets(made_tokenizers, kind):
    directory = made_tokenizers / kind
    plain = vocabularies.load(str(directory))
    for prefix, text, recorded in (
        ("space:", " fish", {"target_space": "space"}),
        ("nospace:", "fish", {"target_space": "none"}),
    ):
        vocabulary = vocabularies.load(f"{prefix}{directory}")
        assert vocabulary.encode("the cat") == plain.encode("the cat")
        targets = vocabularies.continuing(vocabulary)
        assert targets.encode("fish") == plain.encode(text)
        assert targets.decode(targets.encode("fish")) == "fish"
        assert vocabularies.settings(vocabulary) == recorded
        assert described(f"{prefix}{directory}") == described(directory) | {
            "name": f"{prefix}{directory}"
        }
    if kind == "byte_level":
        chat = f"chat:{directory}"
        for name, text in ((chat, "yes"), (f"space:{chat}", " yes"), (f"nospace:{chat}", "yes")):
            targets = vocabularies.continuing(vocabularies.load(name))
            assert targets.encode("yes") == plain.encode(text)


@pytest.mark.parametrize(
    ("prefixes", "kind", "message"),
    [
        ("space:nospace:", "byte_level", "one of space: and nospace:"),
        ("chat:chat:", "byte_level", "chat: once at most"),
        ("chat@2025-13-40:", "byte_level", r"'2025-13-40' is not a date; expected chat@YYYY-MM-DD"),
        ("chat@:", "byte_level", "'' is not a date"),
        ("nospace:", "t5", "encode targets as they are; leave space: and nospace: out"),
        ("space:chat:", "llama_pieces", "leave chat: out"),
    ],
)
def test_prefixes_that_mean_nothing_are_refused(made_tokenizers, prefixes, kind, message):
    with pytest.raises(DataError, match=message):
        vocabularies.load(f"{prefixes}{made_tokenizers / kind}")


def test_a_template_that_writes_the_first_token_does_not_get_another(made_tokenizers, edited):
    vocabulary = vocabularies.load(f"chat:{made_tokenizers / 'llama'}")
    assert vocabulary.encode("hello")[0] == 1
    assert vocabularies.start_id(vocabulary) is None
    assert vocabularies.start_id(vocabularies.continuing(vocabulary)) == 1
    without = edited("llama", chat_template="{{ messages[0]['content'] }}")
    assert vocabularies.start_id(vocabularies.load(f"chat:{without}")) == 1


def test_a_template_may_be_a_file_or_one_of_a_list_and_use_what_transformers_gives(edited):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ 'ab' }}"}]
    directory = edited("byte_level", chat_template=named)
    plain = vocabularies.load(str(directory))
    assert vocabularies.load(f"chat:{directory}").encode("x") == plain.encode("ab")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}"
        "{% endfor %}{{ eos_token }}{{ strftime_now('%%') }}{{ tools is none }}"
    )
    wanted = '{"role": "user", "content": "<é>"}<|im_end|>%True'
    assert vocabularies.load(f"chat:{directory}").encode("<é>") == plain.encode(wanted)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        (
            [{"name": "rag", "template": "x"}],
            r"none of its chat templates \['rag'\] is the default",
        ),
        ("{{ raise_exception('only in threes') }}", r"chat template fails \(only in threes\)"),
        ("{% for %}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),
    ],
)
def test_a_chat_template_that_is_missing_or_fails_is_refused(edited, template, message):
    with pytest.raises(DataError, match=message):
        vocabularies.load(f"chat:{edited('byte_level', chat_template=template)}")


def test_a_template_that_fails_on_a_text_names_it_an_invalid_argument(edited):
    template = "{% if messages[0]['content'] == '' %}{{ raise_exception('empty') }}{% endif %}"
    vocabulary = vocabularies.load(f"chat:{edited('byte_level', chat_template=template)}")
    dataset = tf.data.Dataset.from_tensors("").map(as_seqio(vocabulary).encode_tf)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"chat template fails \(empty\)"):
        list(dataset)


def test_chat_without_a_tokenizer_json_is_refused(made_tokenizers):
    for name in ("microworld", made_tokenizers / "t5", made_tokenizers / "llama_pieces"):
        with pytest.raises(DataError, match="leave chat: out"):
            vocabularies.load(f"chat:{name}")


def test_what_holds_no_tokenizer_is_refused_by_name(tmp_path, edited):
    with pytest.raises(DataError, match=r"none of spiece.model, tokenizer.json and tokenizer.mod"):
        vocabularies.load(str(tmp_path))
    with pytest.raises(DataError, match="no such file or directory"):
        vocabularies.load(f"chat:{tmp_path / 'nothing'}")
    directory = edited("byte_level", eos_token="</s>")
    with pytest.raises(DataError, match=r"eos_token '</s>' is not in tokenizer.json"):
        vocabularies.load(str(directory))
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: damaged"):
        vocabularies.load(str(directory))
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not one that tokenizers \d"):
        vocabularies.load(str(directory))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3's
    with pytest.raises(DataError, match=r"tokenizer.model is not a SentencePiece model"):
        vocabularies.load(str(directory))


def test_tasks_encode_targets_as_going_on_and_keep_their_texts(made_tokenizers):
    lengths = {"inputs": 512, "targets": 64}
    directory = str(made_tokenizers / "byte_level")
    vocabulary = vocabularies.load(directory)
    try:
        tasks.register(vocabulary=directory)
        (ranked,) = examples.ranking_examples(
            "imdb_liked_it", "validation", lengths=lengths, max_examples=1
        )
        for text, ids in zip(ranked.choices_text, ranked.choices, strict=True):
            assert text == text.strip()
            assert ids.tolist() == [*vocabulary.encode(f" {text}"), vocabulary.eos_id]
        assert ranked.inputs.tolist() == vocabulary.encode(ranked.inputs_text)
        (free,) = examples.generation_examples(
            "imdb_write_review", "validation", lengths=lengths, max_examples=1
        )
        assert free.target.tolist()[:-1] == vocabulary.encode(f" {free.reference_text}")[:63]
        assert free.reference[0] == free.reference[0].strip()
    finally:
        tasks.register()


def test_batches_go_on_where_they_were_left(made_tokenizers):
    settings = {
        "lengths": {"inputs": 64, "targets": 32},
        "batch_size": 2,
        "seed": 0,
    }
    try:
        tasks.register(vocabulary=f"chat:{made_tokenizers / 'byte_level'}")
        batches = pipeline.training_batches("sentiment", **settings)
        next(batches)
        state = batches.state()
        wanted = [next(batches) for _ in range(2)]
        found = pipeline.training_batches("sentiment", **settings, state=state)
        for batch in wanted:
            for name, rows in next(found).items():
                assert np.array_equal(rows, batch[name])
    finally:
        tasks.register()


def test_a_conversation_has_the_ids_of_its_rendered_turns(edited):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    name = f"chat:{edited('byte_level', chat_template=template)}"
    vocabulary = vocabularies.load(name)
    ids = vocabulary.encode_turns(["a", "b", "c"])
    assert vocabulary.decode(ids) == "user: a;assistant: b;user: c;"
    plain = vocabularies.load(name.removeprefix("chat:"))
    assert plain.encode_turns(["a", "b", "c"]) == plain.encode("c")
