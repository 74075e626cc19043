"""The embedded data's answers: true in its world, told by its text, given away by nothing."""

import collections
import functools
import math
import re

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from m2l.tasks import microworld, t0_held_in
from m2l.tasks.microworld import world

records = functools.cache(microworld.records)
corpus = functools.cache(microworld.corpus)

# Giveaways. Half of the training records teach, the other half test: 1,470 questions.


def _choices(dataset):
    for record in records(dataset, "train"):
        if dataset == "super_glue_copa":
            yield [record["choice1"], record["choice2"]], record["label"]
        else:
            yield record["endings"], int(record["label"])


def _is_chance(right, chance):
    """Whether so many right answers are within four standard errors of guessing."""
    share = sum(right) / len(right)
    return abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / len(right))


@pytest.mark.parametrize("dataset", ["super_glue_copa", "hellaswag"])
def test_choices_alone_do_not_give_the_answer_away(dataset):
    asked = list(_choices(dataset))
    chance = 1 / len(asked[0][0])
    teach, test = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    for guess in (
        lambda choices: 0,
        lambda choices: max(range(len(choices)), key=lambda i: len(choices[i])),
        lambda choices: min(range(len(choices)), key=lambda i: len(choices[i])),
    ):
        assert _is_chance([guess(choices) == label for choices, label in asked], chance)
    bags = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(C=0.1).fit(
        bags.fit_transform([choice for choices, _ in teach for choice in choices]),
        [i == label for choices, label in teach for i in range(len(choices))],
    )
    right = [
        model.decision_function(bags.transform(choices)).argmax() == label
        for choices, label in test
    ]
    assert _is_chance(right, chance)


def _bag_of_words_accuracy(texts, labels, test_texts, test_labels):
    bags = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(C=1.0, max_iter=200).fit(bags.fit_transform(texts), labels)
    return list(model.predict(bags.transform(test_texts)) == test_labels)


@pytest.mark.parametrize("field", ["premise", "hypothesis"])
@pytest.mark.parametrize("dataset", ["super_glue_rte", "anli_r1", "anli_r2", "anli_r3"])
def test_one_half_of_an_inference_does_not_give_the_label_away(dataset, field):
    made = records(dataset, next(iter(microworld.DATASETS[dataset].splits)))
    texts, labels = [r[field] for r in made], [r["label"] for r in made]
    half = len(made) // 2
    right = _bag_of_words_accuracy(texts[:half], labels[:half], texts[half:], labels[half:])
    assert _is_chance(right, 1 / len(set(labels)))


def test_only_question_and_sentence_together_decide_wiki_qa():
    made = records("wiki_qa", "train")
    half = len(made) // 2
    labels = [r["label"] for r in made]
    for text in (
        lambda r: r["answer"],
        lambda r: r["question"],
        lambda r: f"{r['question']} {r['answer']}",
    ):
        texts = [text(r) for r in made]
        right = _bag_of_words_accuracy(texts[:half], labels[:half], texts[half:], labels[half:])
        assert _is_chance(right, 1 / 2)


@pytest.mark.parametrize(
    ("dataset", "text", "label"),
    [
        ("imdb", lambda r: r["text"], "label"),
        ("app_reviews", lambda r: r["review"], "star"),
        ("ag_news", lambda r: r["text"], "label"),
        ("dbpedia_14", lambda r: f"{r['title']} {r['content']}", "label"),
    ],
)
def test_the_words_of_a_text_tell_its_class(dataset, text, label):
    made = records(dataset, "train")[:1200]
    texts, labels = [text(r) for r in made], [r[label] for r in made]
    right = _bag_of_words_accuracy(texts[:1000], labels[:1000], texts[1000:], labels[1000:])
    assert sum(right) / len(right) > 0.95


def test_no_entry_of_dbpedia_says_the_name_of_its_class():
    dbpedias = "institution office transportation natural place written"
    [dbpedia] = (d for d in t0_held_in.DATASETS if d.name == "dbpedia_14")
    names = "|".join([*dbpedia.prompts[0].answer_choices, *dbpedias.split()])
    for record in records("dbpedia_14", "train"):
        assert not re.search(rf"\b({names})\b", f"{record['title']} {record['content']}"), record


# What is asked is true in the world, and the corpus tells it.


def _facts_by_wording():
    """Every sentence, and every question, about true facts -> the facts."""
    sentences, questions = collections.defaultdict(set), {}
    for name, relation in world.RELATIONS.items():
        for subject, value in relation.facts.items():
            named = relation.subject.format(subject)
            for wording in range(4):
                said = relation.state(wording, named, value)
                sentences[said].add((name, subject))
                if name == "friend":
                    sentences[said].add((name, value))
                questions[world.a_or_an(relation.questions[wording].format(s=named))] = (
                    name,
                    subject,
                )
    return sentences, questions


@pytest.mark.parametrize(
    ("noun", "article"), [("owl", "an"), ("useless film", "a"), ("ugly hat", "an"), ("cat", "a")]
)
def test_an_article_fits_the_sound_of_the_word_after_it(noun, article):
    assert world.a_or_an(f"it is a {noun}.") == f"it is {article} {noun}."


def test_wiki_qa_is_labelled_by_what_the_sentence_says():
    sentences, questions = _facts_by_wording()
    for record in records("wiki_qa", "train"):
        answers = questions[record["question"]] in sentences[record["answer"]]
        assert record["label"] == int(answers), record


def _facts_said(sentence):
    """The facts about people, of the world or not, that a sentence says: (relation, who, value)."""
    facts = set()
    for name in world.PERSON_RELATIONS:
        for statement in world.RELATIONS[name].statements:
            pattern = statement.replace(".", r"\.").format(s=r"(?P<s>\w+( \w+)?)", o=r"(?P<o>\w+)")
            if found := re.fullmatch(pattern, sentence):
                facts.add((name, found["s"], found["o"]))
                if name == "friend":
                    facts.add((name, found["o"], found["s"]))
    assert facts, sentence
    return facts


def test_rte_entails_what_the_premise_says_in_other_words():
    for record in records("super_glue_rte", "train"):
        said = [sentence.strip() for sentence in re.findall(r"[^.]+\.", record["premise"])]
        assert record["hypothesis"] not in said
        follows = bool(_facts_said(record["hypothesis"]) & set().union(*map(_facts_said, said)))
        assert record["label"] == int(not follows), record


def test_what_is_true_in_the_world_does_not_tell_what_rte_entails():
    world_facts = {
        (name, who, value)
        for name in world.PERSON_RELATIONS
        for who, value in world.RELATIONS[name].facts.items()
    }
    for split in ("train", "validation"):
        labels = {True: [], False: []}
        for record in records("super_glue_rte", split):
            labels[bool(_facts_said(record["hypothesis"]) & world_facts)].append(record["label"])
        for found in labels.values():
            assert _is_chance(found, 1 / 2)
        assert _is_chance([True] * len(labels[True]) + [False] * len(labels[False]), 1 / 2)


def _spoken_of(premise):
    """Sentences with who each is about: he and she are the one who was named last."""
    who = ""
    for sentence in re.findall(r"[^.]+\.", premise):
        sentence = sentence.strip()
        if named := re.findall(rf"\b(?:{'|'.join(world.FIRST_NAMES)}) \w+", sentence):
            who = named[0]
        yield re.sub(r"^(he|she) ", f"{who} ", sentence)


def _label(facts, asked, value):
    """The label of a claim, by what each thing asked about is known to be."""
    return 1 if asked not in facts else 0 if facts[asked] == value else 2


def test_anli_r2_is_labelled_by_what_the_premise_says_of_the_person_meant():
    for split in microworld.DATASETS["anli_r2"].splits:
        for record in records("anli_r2", split):
            meeting, *said = _spoken_of(record["premise"])
            facts = {(name, who): v for s in said for name, who, v in _facts_said(s)}
            assert len(facts) == 4
            assert len({who for _, who in facts if who in meeting}) == 2
            [(name, who, value)] = _facts_said(record["hypothesis"])
            assert record["label"] == _label(facts, (name, who), value), record
            assert value in facts.values()
            assert record["hypothesis"] not in said


def _feelings_told(premise):
    who, facts = "", {}
    for sentence in premise.rstrip(".").split(". "):
        if denial := re.fullmatch(r"(he|she) was not (\w+)", sentence):
            assert denial[1] == world.PRONOUNS[who]
            facts[who, denial[2]] = False
        else:
            who, feeling = re.fullmatch(r"(\w+) .* and (?:got|felt) (\w+)", sentence).groups()
            facts[who, feeling] = True
    return facts


def _turns_told(premise):
    """What people say of themselves in a dialogue, also by a yes."""
    kinds = {"i am": "job", "i live": "home", "my pet": "pet", "my hobby": "hobby"}
    kinds |= {"are you": "job", "do you live": "home", "is your pet": "pet"}
    kinds["is your hobby"] = "hobby"
    facts, asked = {}, None
    for speaker, said in re.findall(r"(\w+): (.*?)(?= \w+: |$)", premise):
        for sentence in re.findall(r"[^.?]+[.?]", said):
            sentence = sentence.strip().removeprefix("no, ")
            kind = next((kinds[begin] for begin in kinds if sentence.startswith(begin)), None)
            value = sentence.rstrip(".?").split()[-1]
            if sentence.endswith("?"):
                asked = kind, value
            elif sentence == "yes.":
                facts[asked[0], speaker] = asked[1]
            else:
                facts[kind, speaker] = value
    return facts


def _deeds_told(premise):
    """The deeds of each person in order."""
    who, deeds = "", {}
    for sentence in premise.rstrip(".").split(". "):
        later = re.fullmatch(r"after that (?:he|she) (.+)", sentence)
        if later:
            deeds[who].append(later[1])
        else:
            who, both = sentence.split(" ", 1)
            deeds[who] = both.split(" and then ")
    return deeds


def test_anli_r3_is_labelled_by_what_happens_to_the_person_meant():
    seen = collections.Counter()
    for split in microworld.DATASETS["anli_r3"].splits:
        for record in records("anli_r3", split):
            premise, claim = record["premise"], record["hypothesis"].rstrip(".")
            if order := re.fullmatch(r"(\w+) (.+) (before|after) (?:he|she) (.+)", claim):
                who, one, link, other = order.groups()
                done = _deeds_told(premise)[who]
                label = 1
                if one in done and other in done:
                    label = 2 * ((done.index(one) < done.index(other)) != (link == "before"))
                seen["order"] += 1
            elif ":" in premise:
                [(name, who, value)] = _facts_said(f"{claim}.")
                label = _label(_turns_told(premise), (name, who), value)
                seen["dialogue"] += 1
            else:
                who, _, denied, feeling = re.fullmatch(
                    r"(\w+) (felt|was|did) (not )?(?:feel )?(\w+)", claim
                ).groups()
                label = _label(_feelings_told(premise), (who, feeling), not denied)
                seen["feeling"] += 1
            assert record["label"] == label, record
    assert min(seen.values()) > 1000


def test_hotpotqa_asks_for_facts_that_the_corpus_tells():
    told = " ".join(corpus("train"))
    said, _ = _facts_by_wording()
    rewordings = {span: [other for other in said if said[other] & said[span]] for span in said}
    for split in ("train", "validation"):
        for record in records("kilt_tasks_hotpotqa", split):
            [output] = record["output"]
            spans = [span for p in output["provenance"] for span in p["meta"]["evidence_span"]]
            assert len(spans) == 2
            assert all(any(said in told for said in rewordings[span]) for span in spans)
            assert output["answer"] in re.findall(r"\w+", spans[1])


def test_no_two_people_share_two_likings():
    for one in world.PEOPLE.values():
        for other in world.PEOPLE.values():
            if one.name < other.name:
                likings = {one.town, one.pet, one.food, one.hobby}
                assert len(likings & {other.town, other.pet, other.food, other.hobby}) < 2


def _without_names(text):
    return re.sub(
        rf"\b({'|'.join([*world.PEOPLE, *world.FIRST_NAMES])}|he|she)\b", "p", text
    ).strip(" .")


def test_copas_answers_are_happenings_that_the_corpus_joins():
    joined = set()
    for line in corpus("train"):
        line = _without_names(line)
        for cause, effect in re.findall(
            r"([^.,]+)(?:, so |\. that is why |\. because of this )([^.,]+)", line
        ):
            joined.add((cause.strip(), effect.strip()))
        for effect, cause in re.findall(
            r"([^.,]+)(?:\. why\? because |\. this happened because | because )([^.,]+)", line
        ):
            joined.add((cause.strip(), effect.strip()))
    told = 0
    for record in records("super_glue_copa", "validation"):
        choices = [_without_names(record["choice1"]), _without_names(record["choice2"])]
        premise = _without_names(record["premise"])
        order = 1 if record["question"] == "effect" else -1
        told += (premise, choices[record["label"]])[::order] in joined
        assert (premise, choices[1 - record["label"]])[::order] not in joined
    assert told > 0.95 * len(records("super_glue_copa", "validation"))


def test_hellaswags_right_ending_alone_follows_in_the_corpus():
    told = _without_names(" ".join(corpus("train"))).replace("then p", "p")
    for record in records("hellaswag", "validation"):
        last = _without_names(record["ctx_a"]).split(". ")[-1]
        follows = [f"{last}. p {_without_names(ending)}." in told for ending in record["endings"]]
        assert [i for i, yes in enumerate(follows) if yes] == [int(record["label"])]
