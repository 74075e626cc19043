"""`m2l tasks`: what is listed, shown and cached, and what a mistake in it says."""

import json

import pytest

from m2l import tasks
from m2l.tasks import skills, sources


def test_the_list_has_every_dataset_with_its_size_licence_and_paper(run_m2l, capsys):
    assert run_m2l("tasks", "list") == 0
    printed = capsys.readouterr().out
    assert "27 datasets" in printed
    for dataset in sources.T0:
        # A long cell goes on in the next line.
        [row] = [line for line in printed.splitlines() if line.startswith(f"{dataset.name} ")]
        assert f"{dataset.sizes['train']:,}" in row
        assert dataset.licence.split()[0] in row
        assert dataset.paper.split()[0] in row
        assert dataset.prompts[0].metrics[0] in row


@pytest.mark.parametrize(
    ("filters", "datasets"),
    [
        (["--category", "coreference"], {"super_glue_wsc.fixed", "winogrande_winogrande_xl"}),
        (["--dataset", "anli"], {"anli_r1", "anli_r2", "anli_r3"}),
        (["--mixture", "sentiment_original"], {"app_reviews", "imdb"}),
        (["--held_out"], {dataset.name for dataset in sources.T0 if dataset.held_out}),
        (["--held_in"], {dataset.name for dataset in sources.T0 if not dataset.held_out}),
        (["--source", "tfds"], {dataset.name for dataset in sources.T0 if dataset.tfds}),
        (["--source", "p3", "--held_out"], {d.name for d in sources.T0 if d.held_out}),
    ],
)
def test_a_filter_leaves_the_tasks_of_its_datasets(run_m2l, capsys, filters, datasets):
    assert run_m2l("tasks", "list", *filters) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.rstrip().endswith(", as published"))
    names = {line.split()[0] for line in lines[at + 2 :] if line[:1].strip()} - {"mixtures:"}
    assert names == datasets
    prefixes = tuple(name.removesuffix("_r1")[:4] for name in datasets)
    # JSON lines that other tests have registered are listed as well.
    others = [dataset.name for dataset in (*skills.EMBEDDED, *skills.PUBLIC)]
    own = ("flan_", *others, *sources.PRETRAINING, *tasks._own)
    assert all(line.startswith((*prefixes, *own)) for line in lines[2:at] if line[:1].strip())


def test_a_cached_mixture_is_listed_shown_and_evaluated(road, run_m2l, capsys, tmp_path):
    cache = tmp_path / "cache"
    assert run_m2l("tasks", "cache", "imdb", "--out", cache) == 0
    assert "of 1 datasets: use --source cache:" in capsys.readouterr().out
    shown = []
    for source in ("microworld", f"cache:{cache}"):
        assert run_m2l("tasks", "show", "imdb_good_or_bad", "--source", source) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    digests = []
    for source in ("microworld", f"cache:{cache}"):
        out = tmp_path / source.partition(":")[0]
        code = run_m2l(
            *("eval", "--checkpoint", road / "base", "--mixture", "imdb_good_or_bad"),
            *("--max_examples", 4, "--source", source, "--out", out),
        )
        assert code == 0
        result = json.loads((out / "imdb_good_or_bad.json").read_text())
        digests.append((result["task_digest"], result["score"]))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list", "--source", "hubs"], "unknown source of records 'hubs'"),
        (["list", "--category", "corefrence"], "nearest known one is 'coreference'"),
        (["list", "--dataset", "imdb_"], "nearest known one is 'imdb'"),
        (["show", "dream_letter", "--source", "tfds"], "these sources do: microworld, hub, p3"),
        (["show", "imdb_liked_it", "--split", "dev"], "has no split 'dev'"),
        (["show", "imdb_liked_it", "--source", "jsonl:/nowhere"], "/nowhere/imdb/train.jsonl"),
        (["show", "imdb_liked_it", "--source", "cache:/nowhere"], "/nowhere is not a cache"),
        (["list", "--source", "promptsource"], "M2L_PROMPTSOURCE_DIR"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(run_m2l, capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("M2L_PROMPTSOURCE_DIR", raising=False)
    assert run_m2l("tasks", *arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.strip().splitlines()) == 1
