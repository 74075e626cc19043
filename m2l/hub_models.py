"""Models of the Hugging Face Hub: downloaded by name into its libraries' cache, and pushed."""

import re
from pathlib import Path

from m2l import storage
from m2l.errors import CheckpointError, reason
from m2l.storage import AnyPath, PathLike

# All but pickles, which run code, and weights in other formats or once more.
_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.spm", "*.tiktoken", "*.py"),
    *("*.md", "*.yaml", "LICENSE*", "NOTICE*", "USE_POLICY*"),
]
_LEFT = ["consolidated*", "*/*.safetensors", "*/*.safetensors.index.json"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_NAME = re.compile(r"(?P<owner>[\w.-]+)/(?P<model>[\w.-]+?)(@(?P<revision>[\w./-]+))?")


def is_name(path: PathLike) -> bool:
    """Returns whether a path is `owner/name` or `owner/name@revision`, and nothing local.

    Where there is a folder called as the owner is, a path in it is meant: a mistyped one is no
    name of the Hub.
    """
    match = _NAME.fullmatch(str(path))
    if match is None or match["owner"] in (".", ".."):
        return False
    return not Path(path).exists() and not Path(match["owner"]).exists()


def located(path: PathLike) -> AnyPath:
    """Returns where a model is that is given by a path, or by its name on the Hub.

    Of BASE+ADAPTER each part may be a name.

    One on the Hub is downloaded, of the revision "main" unless it names another, into the cache of
    Hugging Face's libraries, which keep to their settings: HF_HOME, HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE. Nothing is downloaded twice.

    Raises:
        CheckpointError: The Hub has no such model or revision, or cannot be reached and the cache
            does not have it; the model has no safetensors.
    """
    parts = str(path).split("+")
    if len(parts) > 1 and any(map(is_name, parts)):  # BASE+ADAPTER
        return storage.path("+".join(str(located(part)) for part in parts))
    if not is_name(path):
        return storage.path(path)
    import huggingface_hub

    match = _NAME.fullmatch(str(path))
    repository = f"{match['owner']}/{match['model']}"
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=match["revision"],
            allow_patterns=_FILES,
            ignore_patterns=_LEFT,
            library_name="m2l",
        )
    # What can go wrong in a download has classes of its own in three libraries.
    except Exception as error:
        raise CheckpointError(
            f"{path}: neither here, nor to be had of the Hugging Face Hub: {reason(error)}"
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise CheckpointError(f"{path}: the Hub has no safetensors of it; m2l reads no pickles")
    return Path(folder)


def push(directory: PathLike, name: str, *, private: bool = False) -> str:
    """Uploads a Hugging Face directory, with its card, as one commit; returns the commit's address.

    The repository is made if there is none. Of what it has and the directory lacks, weights are
    removed, for they would be another model's; all else stays.

    Args:
        directory: A local directory that m2l merged, exported or extracted: a model or an adapter.
        name: `owner/name`, or `owner/name@branch`.
        private: Whether a new repository is private.

    Raises:
        CheckpointError: It is no such directory or name, or the Hub refuses it.
    """
    import huggingface_hub

    match, directory = _NAME.fullmatch(name), storage.path(directory)
    if match is None:
        raise CheckpointError(f"{name}: expected owner/name, as the Hugging Face Hub has it")
    described = any((directory / f"{kind}config.json").is_file() for kind in ("", "adapter_"))
    if not described or not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory}: no Hugging Face directory; m2l convert {directory} DIR makes one"
        )
    repository, revision = f"{match['owner']}/{match['model']}", match["revision"]
    api = huggingface_hub.HfApi(library_name="m2l")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            revision=revision,
            allow_patterns=_FILES,
            delete_patterns=_WEIGHTS,
            commit_message="Upload a model by m2l",
        )
    except Exception as error:  # as above
        raise CheckpointError(f"{name}: the Hub did not take it: {reason(error)}") from error
    return str(commit.commit_url)
