"""A local page on a folder of runs: lineage, curves, merges side by side, examples that flipped.

It is served to this machine alone and reads what is there at each request; it writes nothing.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from m2l import checkpoints
from m2l.checkpoints import huggingface_directory, opening
from m2l.checkpoints.manifest import Manifest
from m2l.errors import M2LError
from m2l.evaluation import results
from m2l.evaluation.results import Result
from m2l.merging import METHODS
from m2l.reporting import blocks, style
from m2l.training.monitoring import FIGURES, read_figures

if TYPE_CHECKING:
    from flask import Flask

_MOST, _DEPTH = 1000, 6
_COLUMN, _ROW, _WIDTH = 250, 46, 210
_SHOWN = 20
HOSTS = ("127.0.0.1", "localhost")


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A checkpoint or Hugging Face directory of m2l's in the folder.

    Attributes:
        name: Its path in the folder.
        manifest: What it says of itself.
        column: How many generations of parents it has in the folder.
        scores: The score of each task in percent, of results whose model it is.
    """

    name: str
    manifest: Manifest
    column: int
    scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """What is in a folder of runs.

    Attributes:
        models: The models, parents before what was made of them.
        runs: The folders of training runs, by their path in the folder.
        results: The folders of results, by their path in the folder.
    """

    models: Sequence[StoredModel]
    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Result]]


def scan(folder: Path) -> RunFolder:
    """Reads which models, training runs and results a folder has; what is damaged is left out."""
    manifests: dict[str, Manifest] = {}
    runs: dict[str, Path] = {}
    evaluated: dict[str, Mapping[str, Result]] = {}
    for path in _directories(folder):
        name = str(path.relative_to(folder))
        try:
            if (path / FIGURES).is_file():
                runs[name] = path
            if (path / huggingface_directory.MANIFEST).is_file():
                manifests[name] = huggingface_directory.read_manifest(path)
            elif opening.has_manifest(path):
                manifests[name] = checkpoints.read_manifest(path)
            elif any(path.glob("*.json")) and (stored := results.read_results(path)):
                evaluated[name] = stored
        except M2LError:
            continue
    return RunFolder(_ordered(manifests, evaluated), runs, evaluated)


def _directories(folder: Path) -> Iterator[Path]:
    """Yields a folder's directories, none inside a checkpoint or run, `_MOST` at most."""
    pending, seen = [(folder, 0)], 0
    while pending and seen < _MOST:
        path, depth = pending.pop(0)
        seen += 1
        yield path
        inside = (path / huggingface_directory.MANIFEST).is_file() or opening.has_manifest(path)
        if depth < _DEPTH and not inside:
            children = sorted(path.iterdir())
            pending += [
                (child, depth + 1)
                for child in children
                if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
            ]


def _ordered(
    manifests: Mapping[str, Manifest], evaluated: Mapping[str, Mapping[str, Result]]
) -> list[StoredModel]:
    columns: dict[str, int] = {}
    parents = {
        manifest.digest: {parent["digest"] for parent in manifest.parents}
        for manifest in manifests.values()
    }

    def column(digest: str, descendants: frozenset[str] = frozenset()) -> int:
        if digest not in columns:
            known = parents[digest] & parents.keys() - descendants - {digest}
            below = descendants | {digest}
            columns[digest] = 1 + max((column(each, below) for each in known), default=-1)
        return columns[digest]

    models = [
        StoredModel(
            name,
            manifest,
            column(manifest.digest),
            {
                task: result.score
                for stored in evaluated.values()
                for task, result in stored.items()
                if result.model_digest == manifest.digest
            },
        )
        for name, manifest in manifests.items()
    ]
    return sorted(models, key=lambda model: (model.column, model.name))


def lineage(models: Sequence[StoredModel]) -> dict[str, object]:
    """Returns the boxes and lines of the models' graph, parents to the left, in pixels."""
    rows: dict[int, int] = {}
    boxes, places = [], {}
    for model in models:
        row = rows[model.column] = rows.get(model.column, -1) + 1
        x, y = model.column * _COLUMN, row * _ROW
        places.setdefault(model.manifest.digest, (x, y))
        boxes.append({"x": x, "y": y, "name": model.name, "origin": model.manifest.origin()})
    lines = [
        {
            "from": (places[parent["digest"]][0] + _WIDTH, places[parent["digest"]][1] + 17),
            "to": (box["x"], box["y"] + 17),
            "role": parent["role"],
        }
        for model, box in zip(models, boxes, strict=True)
        for parent in model.manifest.parents
        if parent["digest"] in places
    ]
    width = 1 + max((model.column for model in models), default=0)
    return {
        "boxes": boxes,
        "lines": lines,
        "width": width * _COLUMN,
        "height": _ROW * (1 + max(rows.values(), default=0)),
        "box": _WIDTH,
    }


def curves(runs: Mapping[str, Path]) -> markupsafe.Markup | None:
    """Draws the training loss of each run over its steps; None: there is none."""
    figures = {name: read_figures(path) for name, path in runs.items()}
    figures = {name: [r for r in rows if "loss" in r] for name, rows in figures.items()}
    figures = {name: rows for name, rows in figures.items() if rows}
    if not figures:
        return None
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(8.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, rows in figures.items():
            steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
            axis.plot(steps, losses, marker="o", markersize=3, linewidth=1.3, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=3)
    return blocks.svg(figure, "curves", "The training loss of each run over its steps.")


def merges(models: Sequence[StoredModel]) -> dict[str, object]:
    """Returns the table of merges: their settings that differ, and their scores."""
    rows = [
        (model, model.manifest.made_by["recipe"])
        for model in models
        if model.manifest.made_by.get("kind") == "merge"
    ]
    names = dict.fromkeys(name for _, recipe in rows for name in recipe)
    differing = [
        name for name in names if name == "method" or len({str(r.get(name)) for _, r in rows}) > 1
    ]
    tasks = list(dict.fromkeys(task for model, _ in rows for task in model.scores))
    return {
        "columns": ["model", *(name.replace("_", " ") for name in differing), *tasks],
        "rows": [
            [
                model.name,
                *(_setting(recipe.get(name)) for name in differing),
                *(f"{model.scores[t]:.2f}" if t in model.scores else "–" for t in tasks),
            ]
            for model, recipe in rows
        ],
    }


def _setting(value: object) -> str:
    return "–" if value in (None, [], ()) else str(value)


def application(folder: Path) -> "Flask":
    """Returns the web application of a folder, with two pages: / and /flips."""
    from flask import Flask, abort, request

    app = Flask("m2l", static_folder=None)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("m2l.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = templates.get_template("local_page.html.jinja")

    @app.before_request
    def check_host() -> None:
        """Refuses requests that a page of elsewhere sends under a name of its own."""
        if urlsplit(f"//{request.host}").hostname not in HOSTS:
            abort(403)

    @app.get("/")
    def overview() -> str:
        content = scan(folder)
        return template.render(
            folder=str(folder),
            content=content,
            graph=lineage(content.models),
            curves=curves(content.runs),
            merges=merges(content.models),
            methods={m.name: list(m.hyper_parameters) for m in METHODS.values()},
            settings=dict.fromkeys(n for m in METHODS.values() for n in m.hyper_parameters),
            flips=None,
        )

    @app.get("/flips")
    def flips() -> str:
        content = scan(folder)
        pair = [request.args.get(side, "") for side in ("one", "other")]
        if any(name not in content.results for name in pair):
            abort(404)
        try:
            comparisons, _ = results.compare(*(folder / name for name in pair))
            message = ""
        except M2LError as error:
            comparisons, message = [], error.render()
        shown = {"pair": pair, "comparisons": comparisons, "message": message, "most": _SHOWN}
        return template.render(folder=str(folder), content=content, flips=shown)

    return app
