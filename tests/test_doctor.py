import base64
import hashlib
import os
import sys

import jax
import pytest

from m2l import __version__, doctor

REQUIRES = [
    "jax>=0.10.2,<0.11",
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    'pytest>=8; extra == "test"',
]
SOUND = {
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "seqio": "0.0.20",
    "t5": "0.9.4",
    "tensorflow-cpu": "2.21.0",
    "tensorflow-datasets": "4.9.10",
}
FOLDERS = {
    "seqio-nightly": "seqio",
    "tensorflow-datasets": "tensorflow_datasets",
    "tfds-nightly": "tensorflow_datasets",
}


def install(site, name, version, requires=()):
    """Does what pip does: writes the files and, beside them, the record of what was written."""
    record = []
    for file in ("__init__.py", "version.py"):
        path = site / FOLDERS.get(name, name.replace("-", "_")) / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {file} of {name}\n__version__ = '{version}'\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
        record.append(f"{path.relative_to(site)},sha256={digest.rstrip(b'=').decode()},1\n")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(record))


def installed(site, **changes):
    """A site with the sound installation, but for the versions given; None leaves one out."""
    site.mkdir(exist_ok=True)
    install(site, "m2l", __version__, REQUIRES)
    for name, version in {**SOUND, **changes}.items():
        if version is not None:
            requires = ["jaxlib<=0.10.2,>=0.10.1"] if name == "jax" else []
            install(site, name, version, requires)
    return site


def bad(site):
    return {f.name: f for f in doctor.installation([str(site)]) if not f.ok}


def test_packages_that_are_as_they_should_be_are_one_line(tmp_path):
    sound = doctor.installation([str(installed(tmp_path))])
    lines = doctor.render(sound).splitlines()
    packages = [each.name for each in sound if each.name not in ("python", "m2l")]
    assert [line.split()[1] for line in lines[:-1]] == ["python", "m2l", "packages"]
    assert f" {len(packages)} in their ranges" in lines[-2]
    assert len(doctor.render(sound, unfold=True).splitlines()) == len(sound) + 1


def test_a_sound_installation_has_nothing_to_repair(tmp_path):
    findings = doctor.installation([str(installed(tmp_path))])
    assert all(finding.ok and not finding.repair for finding in findings)
    assert {f.name for f in findings} == {
        *("python", "m2l", "jax", "jaxlib", "seqio", "t5", "tensorflow", "tensorflow-datasets")
    }


def test_nightlies_beside_the_releases_are_found_with_the_command_that_repairs_them(tmp_path):
    site = installed(tmp_path)
    install(site, "seqio-nightly", "0.0.18.dev20250227")
    install(site, "tfds-nightly", "4.9.2.dev202308090034")
    pip = f"{sys.executable} -m pip"
    assert {name: finding.repair for name, finding in bad(site).items()} == {
        "seqio": f"{pip} uninstall -y seqio-nightly && "
        f"{pip} install --force-reinstall --no-deps seqio==0.0.20",
        "tensorflow-datasets": f"{pip} uninstall -y tfds-nightly && "
        f"{pip} install --force-reinstall --no-deps tensorflow-datasets==4.9.10",
    }
    text = doctor.render(list(bad(site).values()))
    assert "seqio 0.0.20 and seqio-nightly 0.0.18.dev20250227 share one folder" in text
    assert "uninstall -y tfds-nightly" in text
    assert "2 of 2 need repair" in text


def test_files_of_another_distribution_are_found_when_its_metadata_is_gone(tmp_path):
    site = installed(tmp_path)
    install(site, "tfds-nightly", "4.9.2.dev202308090034")
    for path in (site / "tfds_nightly-4.9.2.dev202308090034.dist-info").iterdir():
        path.unlink()
    (site / "tfds_nightly-4.9.2.dev202308090034.dist-info").rmdir()
    finding = bad(site).pop("tensorflow-datasets")
    assert (
        finding.value == "tensorflow-datasets 4.9.10, but 2 of its files are missing or not its own"
    )
    assert finding.repair.endswith("--force-reinstall --no-deps tensorflow-datasets==4.9.10")


def test_files_that_an_uninstall_took_along_are_missed(tmp_path):
    site = installed(tmp_path)
    (site / "seqio" / "version.py").unlink()
    assert "1 of its files" in bad(site)["seqio"].value


def test_both_builds_of_tensorflow_are_a_mixed_install_and_either_alone_is_sound(tmp_path):
    assert not bad(installed(tmp_path / "cpu"))
    only = {"tensorflow-cpu": None, "tensorflow": "2.21.0"}
    assert not bad(installed(tmp_path / "full", **only))
    both = bad(installed(tmp_path / "both", tensorflow="2.21.0"))
    assert "uninstall -y tensorflow-cpu && " in both["tensorflow"].repair
    assert both["tensorflow"].repair.endswith("tensorflow==2.21.0")


def test_a_nightly_alone_does_not_stand_in_for_the_release(tmp_path):
    site = installed(tmp_path, **{"seqio": None, "seqio-nightly": "0.0.18.dev20250227"})
    finding = bad(site)["seqio"]
    assert finding.value == "seqio-nightly 0.0.18.dev20250227 is in its place"
    assert "uninstall -y seqio-nightly && " in finding.repair
    assert finding.repair.endswith("'seqio>=0.0.20'")


@pytest.mark.parametrize(
    ("changes", "name", "value", "repair"),
    [
        ({"jax": "0.12.0"}, "jax", "jax 0.12.0 is outside <0.11,>=0.10.2", "'jax<0.11,>=0.10.2'"),
        ({"jaxlib": "0.9.0"}, "jaxlib", "jaxlib 0.9.0 is outside <=0.10.2,>=0.10.1", "jaxlib<="),
        ({"tensorflow-cpu": "2.15.0"}, "tensorflow", "2.15.0 is outside >=2.21", "tensorflow-cpu>"),
        ({"t5": None}, "t5", "not installed", "install --no-deps t5==0.9.4"),
    ],
)
def test_a_version_outside_the_range_names_both_and_the_install(
    tmp_path, changes, name, value, repair
):
    found = bad(installed(tmp_path, **changes))
    assert set(found) == {name}
    assert value in found[name].value
    assert repair in found[name].repair


def test_two_versions_of_one_distribution_in_a_folder_are_found(tmp_path):
    site = installed(tmp_path)
    install(site, "jax", "0.10.1")
    assert "share one folder" in bad(site)["jax"].value


def test_an_earlier_folder_hides_what_a_later_one_holds(tmp_path):
    first, second = installed(tmp_path / "first"), installed(tmp_path / "second", jax="0.4.1")
    install(second, "seqio-nightly", "0.0.18")
    findings = doctor.installation([str(first), str(second)])
    assert all(finding.ok for finding in findings)


def test_m2l_that_was_not_installed_is_named_with_the_way_to_install_it(tmp_path):
    assert "scripts/install.sh" in bad(tmp_path)["m2l"].repair


def test_metadata_of_another_version_than_the_code_is_found(tmp_path):
    install(tmp_path, "m2l", "0.0.0", REQUIRES)
    assert bad(tmp_path)["m2l"].value == f"the code is {__version__}, the installed metadata 0.0.0"


@pytest.fixture
def compile_cache():
    before = jax.config.jax_compilation_cache_dir
    yield lambda directory: jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_compile_cache_that_cannot_be_made_is_not_ok(tmp_path, compile_cache):
    (tmp_path / "file").write_text("")
    compile_cache(tmp_path / "file" / "cache")
    [finding] = [f for f in doctor.devices() if f.name == "compile cache"]
    assert not finding.ok
    assert "XDG_CACHE_HOME" in finding.repair


def test_devices_are_described_and_nothing_is_written(tmp_path, monkeypatch, compile_cache):
    compile_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    findings = {finding.name: finding for finding in doctor.devices()}
    assert set(findings) == {"devices", "compile cache"}
    assert findings["devices"].ok
    assert findings["compile cache"].ok
    assert os.listdir(tmp_path) == []


def test_an_accelerator_that_jax_does_not_drive_is_named_with_the_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_ACCELERATORS", [("a TPU", str(tmp_path), "tpu")])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    [finding] = [f for f in doctor.devices() if f.name == "devices"]
    assert finding.ok
    assert "a TPU is here and idle" in finding.value
    assert finding.repair.endswith(f"pip install 'jax[tpu]=={jax.__version__}'")


def test_a_backend_that_does_not_start_is_reported_not_raised(monkeypatch):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand so on")

    monkeypatch.setattr(jax, "devices", refuse)
    [finding] = [f for f in doctor.devices() if f.name == "devices"]
    assert not finding.ok
    assert finding.value == "none: Unable to initialize backend 'cuda'"
    assert "JAX_PLATFORMS=cpu" in finding.repair
