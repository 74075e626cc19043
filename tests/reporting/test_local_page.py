"""`m2l ui`: the page on a folder of runs, as a client reads it and as a browser shows it."""

import html
import importlib.resources
import json
import re
import shutil
import threading

import pytest
from werkzeug.serving import make_server

from m2l import checkpoints
from m2l.evaluation import results
from m2l.reporting import local_page

from .test_browser import CHROMIUM, chromium


@pytest.fixture(scope="module")
def runs(road, run_m2l, tmp_path_factory):
    """A folder with a base, two experts, their merges by two methods, and two models' results."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("base", "sentiment", "closed_book_qa")
    for name in names:
        shutil.copytree(road / name, folder / name)
    experts = [part for name in names[1:] for part in ("--expert", folder / name)]
    for method in ("ties", "task_arithmetic"):
        flags = ["--method", method, "--out", folder / "merges" / method]
        assert run_m2l("merge", "--base", folder / "base", *experts, *flags) == 0
    for name in ("sentiment", "merges/ties"):
        out = folder / "results" / name
        flags = ["--mixture", "imdb", "--max_examples", 6, "--examples", "--out", out]
        assert run_m2l("eval", folder / name, *flags) == 0
    return folder


@pytest.fixture(scope="module")
def app(runs):
    return local_page.application(runs)


def test_the_folder_is_read_with_parents_before_what_was_made_of_them(runs):
    content = local_page.scan(runs)
    assert {model.name: model.column for model in content.models} == {
        "base": 0,
        "sentiment": 1,
        "closed_book_qa": 1,
        "merges/ties": 2,
        "merges/task_arithmetic": 2,
    }
    assert set(content.runs) == {"base", "sentiment", "closed_book_qa"}
    assert set(content.results) == {"results/sentiment", "results/merges/ties"}
    scores = {model.name: dict(model.scores) for model in content.models}
    stored = results.read_results(runs / "results/merges/ties")
    assert scores["merges/ties"] == {task: result.score for task, result in stored.items()}
    assert scores["base"] == {}
    graph = local_page.lineage(content.models)
    # Each expert from the base; each merge from the base and both experts.
    assert (
        sorted(line["role"] for line in graph["lines"])
        == ["base"] * 2 + ["expert"] * 4 + ["init"] * 2
    )


def test_the_page_shows_merges_with_the_settings_in_which_they_differ(app, runs):
    page = app.test_client().get("/", headers={"Host": "localhost:1"}).get_data(as_text=True)
    table = page[page.index('aria-label="Merges"') :]
    header = re.findall(r'<th scope="col">(.+?)</th>', table)
    assert header[:2] == ["model", "method"] and header[-6:] == [
        *results.read_results(runs / "results/merges/ties")
    ]
    assert "density" in header and "dtype" not in header
    manifest = checkpoints.read_manifest(runs / "merges/ties")
    assert f"<td>{manifest.made_by['recipe']['density']}</td>" in table


def test_flipped_examples_are_those_of_the_comparison(app, runs):
    client = app.test_client()
    query = {"one": "results/sentiment", "other": "results/merges/ties"}
    page = client.get("/flips", query_string=query, headers={"Host": "127.0.0.1"})
    comparisons, _ = results.compare(*(runs / name for name in query.values()))
    text = html.unescape(page.get_data(as_text=True))
    flips = [flip for comparison in comparisons for flip in comparison.flips]
    assert flips
    for comparison in comparisons:
        assert f"{len(comparison.flips)} of 6 examples flipped" in text
    for flip in flips:
        assert f"<td>{flip.inputs}</td><td>{flip.right}</td><td>{flip.one}</td>" in text


@pytest.mark.parametrize("name", ["../base", "base", "/etc", ""])
def test_only_results_of_the_folder_are_compared(app, name):
    query = {"one": name, "other": "results/sentiment"}
    page = app.test_client().get("/flips", query_string=query, headers={"Host": "localhost"})
    assert page.status_code == 404


def test_a_page_of_elsewhere_is_refused(app):
    assert app.test_client().get("/", headers={"Host": "evil.example"}).status_code == 403


def test_an_empty_folder_has_a_page_and_a_missing_one_is_refused(tmp_path, run_m2l, capsys):
    client = local_page.application(tmp_path).test_client()
    page = client.get("/", headers={"Host": "localhost"}).get_data(as_text=True)
    assert "There is no model" in page
    assert run_m2l("ui", tmp_path / "none") == 2
    assert "expected a local folder" in capsys.readouterr().err


CHECKS = """
<script>
addEventListener("load", async () => {
  const found = {};
  for (const box of document.querySelectorAll("[name=expert]"))
    if (["sentiment", "closed_book_qa"].includes(box.value)) box.click();
  document.querySelector("[name=density]").value = "0.3";
  document.querySelector("[name=density]").dispatchEvent(new Event("input", {bubbles: true}));
  found.command = document.getElementById("line").textContent;
  found.boxes = document.querySelectorAll(".graph rect").length;
  found.hidden = !document.querySelector("[data-setting=drop_rate]").checkVisibility();
  found.curve = document.querySelectorAll(".wide svg title").length;
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  found.axe = (await axe.run()).violations.map((rule) => [rule.id, rule.nodes[0].html]);
  const left = document.createElement("pre");
  left.id = "found";
  left.textContent = JSON.stringify(found);
  document.body.append(left);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_the_form_writes_a_command_that_merges(runs, run_m2l, tmp_path):
    app = local_page.application(runs)
    axe = (importlib.resources.files("axe_core_python") / "axe.min.js").read_text()

    @app.after_request
    def with_checks(response):
        page = response.get_data(as_text=True)
        response.set_data(page.replace("<style>", f"<script>{axe}</script>{CHECKS}<style>", 1))
        return response

    server = make_server("127.0.0.1", 0, app)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        ran = chromium(tmp_path, f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        thread.join()
    left = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.S)
    assert left, ran.stderr[-2000:]
    found = json.loads(html.unescape(left[1]))
    assert found["axe"] == []
    assert (found["boxes"], found["hidden"], found["wide"]) == (5, True, True)
    figures = [line for path in runs.glob("*/metrics.jsonl") for line in path.open()]
    assert found["curve"] == sum('"loss"' in line for line in figures) > 3
    words = found["command"].replace("\\\n", " ").split()
    assert words[:2] == ["m2l", "merge"]
    assert run_m2l(*words[1:]) == 0
    recipe = checkpoints.read_manifest(runs / "merged").made_by["recipe"]
    assert (recipe["method"], recipe["density"]) == ("ties", 0.3)
