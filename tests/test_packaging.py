import ast
import contextlib
import functools
import importlib.metadata
import pydoc
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import m2l
from m2l import signals

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "m2l").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])

# A module may import from the rows above its own, and from nothing in its row or below it.
TABLE = re.search(r"<!-- rows -->\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
ROWS = [set(row.split()) for row in TABLE.splitlines()]
WITHOUT_TENSORFLOW = ("checkpoints", "merging", "models", "partitioning")
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5"}

# Import names that are not their distribution's name with underscores.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# What t5 asks for and m2l leaves out; pyproject.toml tells uv the same.
LEFT_OUT = {"mesh-tensorflow", "seqio-nightly", "tfds-nightly", "transformers"}
# What a dependency imports without asking for it, or asks for in a release that is too old.
# And Orbax, whose format checkpoints are written in, for those who read them with it.
FOR_OTHERS = {"importlib-resources", "tensorflow-datasets", "orbax-checkpoint"}


def module(path):
    """The dotted name's parts: tasks/microworld/world.py -> m2l, tasks, microworld, world."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return (package, *rest) if package == "m2l" else ("m2l", package, *rest)


def top(path):
    return module(path)[1]


@functools.cache
def imports(path):
    """The dotted names a file imports, at any depth, with `from m2l import x` as m2l.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = module(path)[: -node.level] if node.level else ()
            name = ".".join([*start, *filter(None, [node.module])])
            names |= {f"m2l.{alias.name}" for alias in node.names} if name == "m2l" else {name}
    return names


def literal(name):
    """The value of a constant of setup.py, whose strings are all literals."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


REQUIREMENTS = {canonicalize_name(r.name): r for r in map(Requirement, literal("REQUIREMENTS"))}
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))


def third_party(path):
    tops = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"m2l"}
    return {DISTRIBUTIONS.get(top, canonicalize_name(top)) for top in tops}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_the_rows_above_it(path):
    rank = {name: row for row, names in enumerate(ROWS) for name in names}
    assert top(path) in rank, f"{top(path)} has no row in CONTRIBUTING.md"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("m2l.")}
    assert {name for name in used - {top(path)} if rank[name] >= rank[top(path)]} == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_file_imports_is_required_by_setup(path):
    # All but the first are extras, and their absence has a message.
    extras = {"flask", "werkzeug", "t5", "gguf", "lm-eval", "optuna", "sqlalchemy"}
    assert third_party(path) - extras <= set(REQUIREMENTS)


def test_setup_requires_nothing_that_neither_m2l_nor_t5_imports():
    asked = {canonicalize_name(Requirement(r).name) for r in t5_requires()}
    used = {name for path in SOURCES for name in third_party(path)}
    assert set(REQUIREMENTS) - used - asked - FOR_OTHERS == set()


def t5_requires():
    return [r for r in importlib.metadata.requires("t5") if "extra ==" not in r]


def test_setup_requires_what_t5_needs_but_not_t5_nor_what_overwrites_seqio():
    asked = {canonicalize_name(Requirement(r).name) for r in t5_requires()}
    assert asked - LEFT_OUT <= set(REQUIREMENTS)
    assert not (LEFT_OUT | {"t5"}) & set(REQUIREMENTS)


def test_uv_is_told_to_leave_out_the_same():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    overrides = map(Requirement, settings["tool"]["uv"]["override-dependencies"])
    assert {r.name for r in overrides if not r.marker.evaluate()} == LEFT_OUT


def test_the_lock_satisfies_every_requirement_of_setup():
    assert PINS["tensorflow-cpu"]
    pins = PINS | {"tensorflow": PINS["tensorflow-cpu"]}
    for name, requirement in REQUIREMENTS.items():
        assert requirement.specifier.contains(pins[name]), f"{requirement}, pinned {pins[name]}"


def test_the_lock_holds_one_copy_of_each_shared_folder_and_the_tools_of_the_tests():
    assert not (LEFT_OUT | {"tensorflow"}) & set(PINS)
    assert {"t5", "pytest", "hypothesis", "ruff", "setuptools", "wheel"} <= set(PINS)
    assert {"mkdocs-material", "mkdocstrings", "pyrefly"} <= set(PINS)


def test_the_lock_names_no_path_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*-|(?<![\w.])/\w|\.txt", lock, re.M)


def imported_at_the_top(path):
    """The names of the packages that importing a file imports."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_is_seqios_imports_tensorflow_at_its_top(path):
    seqios = path.name.startswith("seqio_")
    assert seqios or not {*imported_at_the_top(path)} & TENSORFLOW


@pytest.mark.parametrize("name", WITHOUT_TENSORFLOW)
def test_what_merges_names_no_tensorflow_anywhere(name):
    for path in SOURCES:
        if top(path) == name:
            assert not {used.split(".")[0] for used in imports(path)} & TENSORFLOW, path


def test_importing_what_merges_loads_no_tensorflow():
    code = "".join(f"import m2l.{name}\n" for name in WITHOUT_TENSORFLOW)
    code += f"import sys\nprint(sorted({TENSORFLOW!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_loaded_on_first_use_and_importing_m2l_imports_nothing_else():
    code = """
import sys, m2l
assert not {"jax", "numpy", "m2l.errors"} & set(sys.modules)
assert set(m2l.__all__) <= set(dir(m2l))
print(m2l.Recipe("average").method, {"tensorflow", "seqio"} & set(sys.modules))
print(*(getattr(m2l, name).__module__ for name in ("evaluate", "load", "merge", "train")))
m2l.nothing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == "average set()"
    assert len(done.stdout.splitlines()[1].split()) == 4
    assert done.stderr.splitlines()[-1].endswith("module 'm2l' has no attribute 'nothing'")


def test_help_prints_the_types_of_public_functions_as_they_are_written():
    for name in ("evaluate", "load", "merge", "save", "sweep", "train"):
        text = pydoc.plain(pydoc.render_doc(getattr(m2l, name)))
        assert "collections.abc." not in text and "typing." not in text, name


def test_every_folder_of_python_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_a_script_next_to_the_clone_imports_m2l_by_the_path_file_of_install(tmp_path):
    clone = tmp_path / "m2l"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    (clone / "m2l").mkdir()
    (clone / "m2l" / "__init__.py").touch()
    (clone / "m2l" / "version.py").write_text('__version__ = "0"\n')
    for name in ("setup.py", "requirements.lock"):
        (clone / name).write_text("setuptools==1\nwheel==1\n")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True, timeout=100
    )
    # The packages themselves take gigabytes: pip is one that does nothing.
    python = clone / ".venv" / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    (Path(purelib.stdout.strip()) / "pip.py").write_text('print("pip 0")\n')
    program = [python, "-c", "import m2l; print(m2l.__file__)"]

    def imported():
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert imported() == "None"  # The clone's folder, a namespace package.
    subprocess.run(["bash", clone / "scripts" / "install.sh"], check=True, timeout=100)
    assert imported() == str(clone / "m2l" / "__init__.py")


def test_python_m_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["m2l", "--version"])
    monkeypatch.setattr(signals, "watched", lambda *_, **__: contextlib.nullcontext())
    runpy.run_module("m2l", run_name="__main__")
    assert m2l.__version__ in capsys.readouterr().out
