"""The one place where gin is read: files and bindings in, validated dataclasses out."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

from m2l import storage
from m2l.errors import ConfigError, M2LError, UnknownNameError
from m2l.merging import Recipe
from m2l.models import Config, LlamaConfig, T5Config
from m2l.studies.merge_to_learn import SkillsStudy
from m2l.studies.merging_at_scale import ScalingStudy
from m2l.studies.method_comparison import MethodComparison
from m2l.studies.recipe_search import RecipeSearch
from m2l.studies.rounds import Rounds
from m2l.training.settings import TrainSettings, from_flat


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What `m2l train` runs: a model, what to do with it, and where the data comes from.

    Without a model or a vocabulary, those of the checkpoint it starts from are taken.
    """

    settings: TrainSettings
    model: Config | None = None
    vocabulary: str | None = None
    source: str = "microworld"


@dataclasses.dataclass(frozen=True)
class AnyStudy:
    """What `m2l study` runs."""

    of: ScalingStudy | SkillsStudy | MethodComparison

    def __post_init__(self) -> None:
        if not isinstance(self.of, ScalingStudy | SkillsStudy | MethodComparison):
            raise ConfigError(
                "Study.of: expected @ScalingStudy(), @SkillsStudy() or @MethodComparison(), found "
                f"{self.of!r}"
            )


CONFIGURABLES = {
    "T5": T5Config,
    "Llama": LlamaConfig,
    "Train": from_flat,
    "Run": TrainingRun,
    "Merge": Recipe,
    "ScalingStudy": ScalingStudy,
    "SkillsStudy": SkillsStudy,
    "MethodComparison": MethodComparison,
    "Study": AnyStudy,
    "Search": RecipeSearch,
    "Rounds": Rounds,
}


# What sets a setting that has no default, in the words of `m2l train`.
_FLAGS = {
    "Train.mixture": "--mixture NAME (m2l tasks list), or --jsonl train=FILE",
    "Train.steps": "--steps N",
}


def _register(name: str, configurable: Callable[..., object]) -> None:
    @functools.wraps(configurable, updated=())
    def build(*args: object, **kwargs: object) -> object:
        for parameter, value in kwargs.items():
            if value is gin.REQUIRED:
                setting = f"{name}.{parameter}"
                flag = _FLAGS.get(setting, f"--gin.{setting}=VALUE")
                raise ConfigError(f"{setting} is not set: {flag}")
        return configurable(*args, **kwargs)

    gin.external_configurable(build, name, module="m2l")


for _name, _configurable in CONFIGURABLES.items():
    _register(_name, _configurable)


def directory() -> Path:
    """Returns the directory of the gin files that come with m2l."""
    return Path(str(resources.files("m2l.gin_configs")))


def _fields(name: str) -> list[str]:
    return list(inspect.signature(CONFIGURABLES[name]).parameters)


def quoted(binding: str) -> str:
    """Returns NAME=VALUE as gin reads it: a bare word is a string."""
    name, equals, value = binding.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name or not value:
        raise ConfigError(f"--gin.{binding}: expected --gin.NAME=VALUE")
    if value[0] not in "@%":
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # Lists and dicts may hold references (@Train()) that are gin's to read.
            if value[0] not in "[({":
                value = repr(value)
    return f"{name} = {value}"


def _refuse_unknown_macros(bindings: Sequence[str], known: Sequence[str]) -> None:
    """Raises for a macro that nothing reads, which gin itself accepts."""
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if "." not in name and name not in known:
            raise UnknownNameError("gin macro", name, known)


def _macros(texts: Sequence[str]) -> list[str]:
    return sorted({name for text in texts for name in re.findall(r"%([A-Z][A-Z0-9_]*)", text)})


def _plain(error: Exception) -> M2LError:
    """Returns gin's multi-line error as one of one line, which says what to do."""
    text = str(error)
    first = text.splitlines()[0] if text else repr(error)
    place = re.search(r"In (?:file )?(bindings string|\".*?\") line \d+", text)
    at = f" ({place.group(0)})" if place else ""
    if isinstance(error, M2LError):
        return ConfigError(first)
    if match := re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", first):
        name = match.group(1).rsplit("/", 1)[-1]
        return UnknownNameError("gin name", name, CONFIGURABLES)
    if match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", first):
        name, parameter = match.groups()
        known = _fields(name.rsplit(".", 1)[-1])
        near = difflib.get_close_matches(parameter, known, n=1, cutoff=0.0)[0]
        return ConfigError(f"{name} has no setting {parameter!r}; the nearest is {near!r}{at}")
    if match := re.search(r"macro\(\).*in scope '(\w+)'", text.replace("\n", " ")):
        return ConfigError(f"the gin macro {match.group(1)} is used, but nothing sets it")
    if match := re.match(r"Unable to open file: (.*?)\. Searched config paths", first):
        return UnknownNameError("gin file, here or of m2l's,", match.group(1), files())
    if match := re.search(r"missing .*required .*?: (.*)", first):
        return ConfigError(f"gin: {match.group(1)} must be set")
    return ConfigError(f"gin: {first}{at}")


class _NameCheck(config_parser.ParserDelegate):
    """Refuses what a gin file could run code by: names of other packages' functions."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        """Refuses a reference to what is not in CONFIGURABLES."""
        _check_name(scoped_configurable_name.rsplit("/", 1)[-1])

    def macro(self, macro_name: str) -> None:
        """Refuses constants, which other packages define, but REQUIRED."""
        if "." in macro_name and macro_name != "gin.REQUIRED":
            raise ConfigError(
                f"gin: %{macro_name} is not a macro: only %NAME and %gin.REQUIRED can be used"
            )


def _check_name(selector: str) -> None:
    if selector.removeprefix("m2l.") not in CONFIGURABLES:
        raise UnknownNameError("gin name", selector, CONFIGURABLES)


def _check_statements(text: str, label: str) -> None:
    """Refuses gin text that imports, or that names functions other than CONFIGURABLES.

    gin imports modules as it reads a file, and calls any function that is registered or, by dynamic
    registration, importable. Nothing is imported or called here.

    Raises:
        ConfigError: An import, or a constant of another package.
        UnknownNameError: A name that is not in CONFIGURABLES.
    """
    for statement in config_parser.ConfigParser(text, _NameCheck()):
        if isinstance(statement, config_parser.ImportStatement):
            raise ConfigError(
                f"{label}, line {statement.location.line_num}: import of {statement.module!r}: gin "
                "files of m2l set values and cannot import; remove the line"
            )
        if isinstance(statement, config_parser.IncludeStatement):
            storage.path(statement.filename)
        elif getattr(statement, "arg_name", True):  # Without, it is a macro's.
            _check_name(statement.selector)


def _open_checked(path: str) -> io.StringIO:
    """Opens a gin file or an included one: gin reads the text that was checked."""
    text = storage.path(path).read_text()
    _check_statements(text, path)
    file = io.StringIO(text)
    file.name = path
    return file


def _is_file(path: str) -> bool:
    # gin asks for an address behind its prefixes as well, which is neither one nor a file.
    if path.startswith(("gs://", "s3://")):
        return storage.path(path).is_file()
    return os.path.isfile(path)


@contextlib.contextmanager
def _file_search() -> Iterator[None]:
    """Has gin look files up in the working directory, then among m2l's own, and nowhere else.

    gin would also take the folders of a relative name for Python packages, and fail where one is
    there without being a package: `runs/` next to `runs/train.gin`.
    """
    state = gin.config._LOCATION_PREFIXES, gin.config._FILE_READERS
    gin.config._LOCATION_PREFIXES = ["", str(directory())]
    gin.config._FILE_READERS = [(_open_checked, _is_file)]
    try:
        yield
    finally:
        gin.config._LOCATION_PREFIXES, gin.config._FILE_READERS = state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps gin from logging what the raised error says already."""
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def load(
    name: str, files: Sequence[str], bindings: Sequence[str] = (), mixture: str | None = None
) -> tuple[Any, str]:
    """Builds one of `CONFIGURABLES` from gin files and bindings.

    Args:
        name: Which one: "Run", "ScalingStudy", "Merge".
        files: Gin files, read in order; a relative name is looked up in the working directory,
            then among the files that come with m2l ("experiments/demo.gin").
        bindings: NAME=VALUE, applied after all files, in order. NAME is a macro or Class.setting;
            a bare word as VALUE is a string.
        mixture: What a run trains on, applied last: the files' MIXTURE, too, by which others of
            their settings may go.

    Returns:
        The validated dataclass, and the gin text that makes it again.

    Raises:
        ConfigError, UnknownNameError: an unknown name or setting, a wrong type or range, a setting
            left out, a file that cannot be read. The message is one line.
    """
    gin.clear_config()
    for file in files:
        storage.path(file)
    try:
        with _quiet(), _file_search():
            gin.parse_config_files_and_bindings(list(files), [], finalize_config=False)
            text = "\n".join(quoted(binding) for binding in bindings)
            macros = _macros([gin.config_str()])
            _refuse_unknown_macros(bindings, macros)
            if mixture is not None:
                names = ["Train.mixture", *(["MIXTURE"] if "MIXTURE" in macros else [])]
                text = "\n".join([text, *(f"{each} = {mixture!r}" for each in names)])
            _check_statements(text, "--gin.NAME=VALUE")
            gin.parse_config(text)
            built = gin.get_configurable(name)()
            return built, gin.operative_config_str()
    except (
        *(ValueError, TypeError, SyntaxError, OSError, ImportError, AttributeError, RuntimeError),
        M2LError,
    ) as error:
        raise _plain(error) from error
    finally:
        gin.clear_config()


def files() -> list[str]:
    """Returns the gin files that come with m2l, as `load` takes them."""
    root = directory()
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.gin"))
