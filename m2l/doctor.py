"""Checks this installation: what is installed, what it runs on, and how to repair it.

Reads the installed distributions' metadata and files; imports neither TensorFlow nor seqio.
"""

import base64
import collections
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from m2l.version import __version__

# Distributions that unpack into the same folder as the one m2l requires: of two installed, the
# last wins file by file, and pip does not notice. A stand-in serves as well, when it is alone.
_RIVALS = {
    "seqio": ("seqio-nightly",),
    "tensorflow-datasets": ("tfds-nightly",),
    "tensorflow": ("tensorflow-cpu", "tf-nightly"),
}
_STAND_INS = {"tensorflow-cpu"}

# Whose Python files are compared with what was installed.
_OVERWRITTEN = ("seqio", "tensorflow-datasets", "t5")

# Required too, but not among the requirements of setup.py, which says why.
_T5 = Requirement("t5==0.9.4")

# A device, the file that shows it, and the extra of jax that drives it.
_ACCELERATORS = (
    ("an NVIDIA GPU", "/dev/nvidia0", "cuda13"),
    ("a TPU", "/dev/accel0", "tpu"),
    ("a TPU", "/dev/vfio/0", "tpu"),
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of one check, and the command or step that repairs or improves it, if any.

    What is `folded` is one of many alike, and only counted where it is ok.
    """

    name: str
    value: str
    ok: bool = True
    repair: str = ""
    folded: bool = False


def report() -> list[Diagnosis]:
    """Returns the findings on this installation and this machine's devices."""
    return [*installation(), *devices()]


def render(findings: Sequence[Diagnosis], unfold: bool = False) -> str:
    """Returns findings as lines of text: a mark, the name, the value, and the repair below.

    Args:
        findings: What was found.
        unfold: Whether each package that is as it should be has a line.
    """
    counted = [] if unfold else [each for each in findings if each.folded and each.ok]
    shown = [each for each in findings if each not in counted]
    width = max(len(finding.name) for finding in [*shown, *counted])
    lines = []
    for finding in shown:
        mark = "ok  " if finding.ok else "BAD "
        lines.append(f"{mark} {finding.name:<{width}}  {finding.value}")
        if finding.repair:
            lines.append(f"{' ' * (width + 7)}-> {finding.repair}")
    if counted:
        lines.append(
            f"ok   {'packages':<{width}}  {len(counted)} in their ranges: --all lists them"
        )
    bad = sum(not finding.ok for finding in findings)
    lines.append(f"{bad} of {len(findings)} need repair" if bad else "this installation is sound")
    return "\n".join(lines)


def installation(path: Sequence[str] | None = None) -> list[Diagnosis]:
    """Checks Python, m2l, and each distribution that m2l requires against its supported range.

    Args:
        path: The folders to look for distributions in; sys.path when None.
    """
    findings = [Diagnosis("python", f"{platform.python_version()} ({sys.executable})")]
    own = _installed("m2l", path)
    version = own[0].version if own else "none"
    if version == __version__:
        findings.append(Diagnosis("m2l", f"{version} ({Path(__file__).parent})"))
    else:
        value = f"the code is {__version__}, the installed metadata {version}"
        repair = "run `bash scripts/install.sh`, or `pip install .`, in the clone of m2l"
        findings.append(Diagnosis("m2l", value, False, repair))

    wanted = [Requirement(text) for each in own[:1] for text in each.requires or ()]
    for jax in _installed("jax", path)[:1]:
        wanted += [r for r in map(Requirement, jax.requires or ()) if r.name == "jaxlib"]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return findings + [_requirement(r, path) for r in sorted([*needed, _T5], key=lambda r: r.name)]


def _installed(name: str, path: Sequence[str] | None) -> list[Distribution]:
    """Returns the distributions of a name in the first folder of `path` that has any."""
    folders = {} if path is None else {"path": list(path)}
    distributions = list(importlib.metadata.distributions(name=name, **folders))
    unique = {(_folder(each), each.version): each for each in distributions}
    return [each for each in unique.values() if _folder(each) == _folder(distributions[0])]


def _folder(distribution: Distribution) -> Path:
    return Path(distribution.locate_file("")).resolve()


def _requirement(requirement: Requirement, path: Sequence[str] | None) -> Diagnosis:
    name = requirement.name
    own = _installed(name, path)
    rivals = [each for rival in _RIVALS.get(name, ()) for each in _installed(rival, path)]
    rivals = [each for each in rivals if not own or _folder(each) == _folder(own[0])]
    everything = [*own, *rivals]
    if not everything:
        return Diagnosis(name, "not installed", False, _pip("install --no-deps", str(requirement)))

    only, stands_in = everything[0], bool(rivals) and _name(rivals[0]) in _STAND_INS
    names = " and ".join(f"{_name(each)} {each.version}" for each in everything)
    supported = requirement.specifier.contains(only.version, prereleases=True)
    wanted = f"{name}=={only.version}" if own and supported else str(requirement)
    reinstall = _pip("install --force-reinstall --no-deps", wanted)
    if len(everything) > 1 or (rivals and not stands_in):
        remove = _pip("uninstall -y", *sorted(map(_name, rivals or own[:1])))
        value = f"{names} {'share one folder' if len(everything) > 1 else 'is in its place'}"
        return Diagnosis(name, value, False, f"{remove} && {reinstall}")
    if not supported:
        wanted = f"{_name(only)}{requirement.specifier}"
        value = f"{names} is outside {requirement.specifier}"
        return Diagnosis(name, value, False, _pip("install --no-deps", wanted))
    if name in _OVERWRITTEN and (altered := _altered(only)):
        value = f"{names}, but {altered} of its files are missing or not its own"
        return Diagnosis(name, value, False, reinstall)
    version = f"{names if rivals else only.version} ({requirement.specifier})"
    return Diagnosis(name, version, folded=True)


def _name(distribution: Distribution) -> str:
    return canonicalize_name(distribution.name)


def _pip(command: str, *arguments: str) -> str:
    return f"{shlex.join([sys.executable, '-m', 'pip'])} {command} {shlex.join(arguments)}"


def _altered(distribution: Distribution) -> int:
    """Counts Python files that are missing, or not what the distribution's record says."""
    altered = 0
    for file in distribution.files or ():
        if file.suffix == ".py" and file.hash:
            path = Path(file.locate())
            digest = path.is_file() and hashlib.new(file.hash.mode, path.read_bytes()).digest()
            recorded = base64.urlsafe_b64decode(file.hash.value + "==")
            altered += digest != recorded
    return altered


def devices() -> list[Diagnosis]:
    """Checks the devices that JAX sees, and its cache of compiled programs."""
    try:
        import jax  # here, because it takes a second and may be what is broken

        visible, backend = jax.devices(), jax.default_backend()
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return [Diagnosis("devices", f"none: {reason}", False, "JAX_PLATFORMS=cpu m2l doctor")]
    kinds = collections.Counter(device.device_kind for device in visible)
    seen = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f" ({backend})"
    advice = ""
    if backend == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for accelerator, path, extra in _ACCELERATORS:
            if Path(path).exists():
                seen += f"; {accelerator} is here and idle"
                advice = _pip("install", f"jax[{extra}]=={jax.__version__}")
                break
    cache = _cache(jax.config.jax_compilation_cache_dir)
    return [Diagnosis("devices", seen, True, advice), cache]


def _cache(directory: str | None) -> Diagnosis:
    if not directory:
        return Diagnosis("compile cache", "off: each run compiles anew")
    folder = Path(directory).absolute()
    present = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            return Diagnosis("compile cache", directory)
    except OSError as error:
        repair = "set XDG_CACHE_HOME to a folder that can be written"
        return Diagnosis("compile cache", f"{directory}: {error.strerror}", False, repair)
