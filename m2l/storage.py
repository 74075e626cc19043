"""Paths of files on a local or mounted file system, Google Cloud Storage and S3.

Local paths are `pathlib.Path`; gs://bucket/key and s3://bucket/key are `ObjectPath`, which has the
part of pathlib's interface that m2l uses. A bucket has objects, not directories: a directory is a
prefix of keys that ends in "/", exists while an object has it, and needs no `mkdir`.

Credentials are found by TensorStore as Google's and Amazon's own tools find theirs. For S3 the
region is AWS_REGION or AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names a
service other than Amazon's, such as MinIO or R2.
"""

import contextlib
import errno
import functools
import io
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING

from m2l.errors import M2LError
from m2l.typing import JsonObject

if TYPE_CHECKING:
    import tensorstore as ts

DRIVERS = {"gs": "gcs", "s3": "s3"}
# In full: 1 + 2 + 4 + 8 + 16 + 16 seconds of waiting before an unreachable service is an error.
RETRIES = {"max_retries": 7, "initial_delay": "1s", "max_delay": "16s"}
# Also as pathlib writes it, with one slash, and behind the working directory.
_SCHEME = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/")
_ADDRESS = re.compile(r"(gs|s3)://([^/]+)(?:/+(.*))?", re.DOTALL)
# TensorStore's generation of an object that does not exist, and of a write that was not done.
_ABSENT, _REFUSED = b"\x02", b""
# What is said of a range beyond an object's end; the second by an emulator of Google's storage.
_BEYOND_END = re.compile("OUT_OF_RANGE|Unexpected Content-Range")
_SMALL = 1 << 16
_PROBES = 64
_AWS_SETTINGS = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@functools.total_ordering
class ObjectPath:
    """The address of an object, or of a prefix of objects, in a bucket; immutable.

    `os.fspath` refuses it, so that no library takes it for a local path; `str` is the address.
    Repeated slashes and "." in a key are dropped, as in paths.

    Args:
        scheme: "gs" or "s3".
        path: Bucket and key, as "bucket/a/b".
    """

    __slots__ = ("_path", "scheme")

    def __init__(self, scheme: str, path: str | PurePosixPath):
        self.scheme = scheme
        self._path = PurePosixPath(path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __reduce__(self) -> tuple:
        return type(self), (self.scheme, str(self._path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self._order == other._order

    def __lt__(self, other: object) -> bool:
        return self._order < other._order if isinstance(other, ObjectPath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._order)

    def __truediv__(self, other: "str | os.PathLike | ObjectPath") -> "ObjectPath":
        if isinstance(other, ObjectPath):
            return other
        return self._with(self._path / str(other).lstrip("/"))

    joinpath = __truediv__

    def _with(self, path: PurePosixPath) -> "ObjectPath":
        return ObjectPath(self.scheme, path)

    @property
    def _order(self) -> tuple[str, tuple[str, ...]]:
        return self.scheme, self._path.parts

    @property
    def bucket(self) -> str:
        return self._path.parts[0]

    @property
    def key(self) -> str:
        """The key in the bucket, without a slash at its end; "" for the bucket itself."""
        return "/".join(self._path.parts[1:])

    @property
    def parts(self) -> tuple[str, ...]:
        return f"{self.scheme}://{self.bucket}", *self._path.parts[1:]

    name = property(lambda self: self._path.name)
    stem = property(lambda self: self._path.stem)
    suffix = property(lambda self: self._path.suffix)
    suffixes = property(lambda self: self._path.suffixes)

    @property
    def parent(self) -> "ObjectPath":
        return self._with(self._path.parent) if self.key else self

    @property
    def parents(self) -> Sequence["ObjectPath"]:
        return [self._with(path) for path in list(self._path.parents)[:-1]]

    def with_name(self, name: str) -> "ObjectPath":
        return self._with(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> "ObjectPath":
        return self._with(self._path.with_suffix(suffix))

    def absolute(self) -> "ObjectPath":
        return self

    def resolve(self, strict: bool = False) -> "ObjectPath":
        return self

    expanduser = absolute

    def is_relative_to(self, other: "Path | ObjectPath") -> bool:
        return (
            isinstance(other, ObjectPath)
            and self.scheme == other.scheme
            and self._path.is_relative_to(other._path)
        )

    def relative_to(self, other: "Path | ObjectPath") -> PurePosixPath:
        if not self.is_relative_to(other):
            raise ValueError(f"{self} is not in {other}")
        return self._path.relative_to(other._path)

    def as_posix(self) -> str:
        return str(self)

    def _generation(self) -> bytes | None:
        """Returns the identity of the object's content, or None where there is no object."""
        if not self.key:
            return None
        with _one_line(self, "read"):
            result = _bucket(self).read(self.key, byte_range=slice(0, 0)).result()
        return None if result.state == "missing" else result.stamp.generation

    def _keys(self) -> list[str]:
        """Returns the keys below this prefix, relative to it, in order."""
        import tensorstore as ts

        prefix = f"{self.key}/" if self.key else ""
        end = f"{self.key}0" if self.key else ""  # "0" follows "/"
        with _one_line(self, "list"):
            listed = _bucket(self).list(ts.KvStore.KeyRange(prefix, end)).result()
        keys = [key.decode() for key in listed]
        # Some tools leave an empty object that is called like the directory.
        return sorted(key.removeprefix(prefix) for key in keys if not key.endswith("/"))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._generation() is not None

    def is_dir(self) -> bool:
        return bool(self._keys())

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yields the objects and prefixes directly below; lists all objects below at once."""
        if not (keys := self._keys()) and self.key:
            raise _missing(self)
        for name in dict.fromkeys(key.split("/", 1)[0] for key in keys):
            yield self / name

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yields the objects and prefixes below that match, in order; "**" is any directories."""
        wanted = PurePosixPath(pattern).parts
        paths = {PurePosixPath(key) for key in self._keys()}
        paths |= {parent for path in paths for parent in path.parents if parent.parts}
        for path in sorted(paths):
            if _matches(path.parts, wanted):
                yield self / str(path)

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        return self.glob(f"**/{pattern}")

    def read_bytes(self) -> bytes:
        with _one_line(self, "read"):
            result = _bucket(self).read(self.key).result()
        if result.state == "missing":
            raise _missing(self)
        return result.value

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        with _one_line(self, "write"):
            _bucket(self).write(self.key, data).result()
        return len(data)

    def write_text(self, data: str, encoding: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def open(self, mode: str = "r", encoding: str | None = None, **options: str | None) -> IO:
        """Returns a file in memory: the whole object, or what is uploaded when it is closed."""
        if mode not in ("r", "rt", "rb", "w", "wt", "wb"):
            raise ValueError(f"{self}: objects cannot be opened with mode {mode!r}")
        if mode[0] == "w":
            upload = _BytesUpload() if "b" in mode else _TextUpload()
            upload.path = self
            return upload
        content = io.BytesIO(self.read_bytes())
        return content if "b" in mode else io.TextIOWrapper(content, encoding or "utf-8", **options)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Writes nothing; raises FileExistsError as pathlib does unless `exist_ok`."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise _missing(self)
        with _one_line(self, "delete"):
            _bucket(self).write(self.key, None).result()

    def stat(self) -> SimpleNamespace:
        """Returns `st_size`, and an `st_mtime_ns` that differs after every write.

        It is the object's generation as an integer, which is not a time on S3.
        """
        if (generation := self._generation()) is None:
            raise _missing(self)
        identity = int.from_bytes(generation, "big")
        return SimpleNamespace(st_size=size(self), st_mtime_ns=identity, st_mode=stat.S_IFREG)


AnyPath = Path | ObjectPath
PathLike = str | os.PathLike | ObjectPath
"""What `path` makes an `AnyPath` of."""


def _missing(path: "ObjectPath") -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


class _Upload:
    """Uploads what was written when it is closed, unless an exception ends its `with` block."""

    path: ObjectPath

    def __exit__(self, kind: type[BaseException] | None, *cause: object) -> None:
        if kind is not None:
            super().close()
        self.close()

    def close(self) -> None:
        if not self.closed:
            write_atomic(self.path, self.getvalue())
        super().close()


class _BytesUpload(_Upload, io.BytesIO):
    pass


class _TextUpload(_Upload, io.StringIO):
    pass


def path(text: PathLike) -> AnyPath:
    """Returns a local path as it is, or the address of an object in a bucket.

    Raises:
        M2LError: It has a scheme other than gs:// and s3://, or no bucket.
    """
    if isinstance(text, ObjectPath):
        return text
    text = os.fspath(text)
    if address := _ADDRESS.fullmatch(text):
        scheme, bucket, key = address.groups()
        if ".." in (key or "").split("/"):
            raise M2LError(f"{text}: an address of an object cannot have '..' in it")
        return ObjectPath(scheme, f"{bucket}/{key or ''}")
    if match := _SCHEME.search(text):
        scheme = match[1]
        if scheme in DRIVERS:
            raise M2LError(f"{text}: expected {scheme}://BUCKET/PATH")
        if scheme.endswith(tuple(f"+{driver}" for driver in DRIVERS)):
            return Path(text)  # BASE+ADAPTER, of which the base is local.
        raise M2LError(
            f"{text}: {scheme}:// is not supported: expected gs://BUCKET/PATH, s3://BUCKET/PATH or "
            "a path of a local or mounted file system"
        )
    return Path(text)


def kvstore_spec(directory: AnyPath) -> JsonObject:
    """Returns TensorStore's specification of the key-value store of a directory's files."""
    if isinstance(directory, Path):
        return {"driver": "file", "path": f"{directory.absolute()}/"}
    driver = DRIVERS[directory.scheme]
    spec = {
        "driver": driver,
        "bucket": directory.bucket,
        "path": f"{directory.key}/" if directory.key else "",
        "context": {f"{driver}_request_retries": RETRIES},
    }
    if driver == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        # TensorStore does not read these two.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            # Services other than Amazon's cannot be asked for a bucket's region.
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
    return spec


def read_range(file: AnyPath, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset` on.

    Raises:
        FileNotFoundError: There is no such file.
        M2LError: The file ends before.
    """
    if isinstance(file, Path):
        with open(file, "rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
    else:
        data = _read_range(file, offset, length)
    if data is None or len(data) != length:
        raise M2LError(f"{file}: ends before byte {offset + length:,}; it is truncated")
    return data


def _read_range(file: ObjectPath, offset: int, length: int) -> bytes | None:
    """Returns a range of an object, or None where it reaches beyond its end."""
    (data,) = _read_ranges(file, [offset], length)
    return data


def _read_ranges(file: ObjectPath, offsets: Sequence[int], length: int) -> list[bytes | None]:
    bucket = _bucket(file)
    futures = [bucket.read(file.key, byte_range=slice(at, at + length)) for at in offsets]
    data = []
    for future in futures:
        with _one_line(file, "read"):
            try:
                result = future.result()
            except ValueError as cause:
                if not _BEYOND_END.search(str(cause)):
                    raise
                data.append(None)
                continue
        if result.state == "missing":
            raise _missing(file)
        data.append(result.value)
    return data


def size(file: AnyPath) -> int:
    """Returns the size of a file in bytes.

    TensorStore does not report the size of an object: small ones are read, and the end of larger
    ones is searched for by reading single bytes, 64 at a time, in at most ten rounds.
    """
    if isinstance(file, Path):
        return file.stat().st_size
    if _read_range(file, _SMALL - 1, 1) is None:
        return len(file.read_bytes())
    low, offsets = 0, [1 << power for power in range(_SMALL.bit_length() - 1, 48)]
    while True:  # every byte before `low` exists
        exists = [byte is not None for byte in _read_ranges(file, offsets, 1)]
        count = exists.index(False)
        low, high = (offsets[count - 1] + 1 if count else low), offsets[count]
        if low == high:
            return low
        step = -(-(high - low) // _PROBES)
        offsets = [*range(low, high, step), high]


def create(file: AnyPath, data: bytes) -> bool:
    """Writes a file unless it exists; of several writers exactly one gets True.

    The file is never seen unfinished.
    """
    if isinstance(file, ObjectPath):
        return swap(file, data, None) is not None
    unfinished = _write_unfinished(file, data)
    try:
        os.link(unfinished, file)
    except FileExistsError:
        return False
    finally:
        unfinished.unlink()
    return True


def generation(file: ObjectPath) -> bytes | None:
    """Returns what identifies an object's content; None where there is no object."""
    return file._generation()


def swap(file: ObjectPath, data: bytes, expected: bytes | None) -> bytes | None:
    """Writes an object if its generation is the expected one; None: if there is no object.

    Returns:
        The new generation, or None where it was another and nothing was written.
    """
    with _one_line(file, "write"):
        condition = _ABSENT if expected is None else expected
        stamp = _bucket(file).write(file.key, data, if_equal=condition).result()
    return None if stamp.generation == _REFUSED else stamp.generation


def write_atomic(file: AnyPath, data: bytes | str) -> None:
    """Writes a file whole or not at all, and replaces what it was; text is UTF-8."""
    data = data.encode() if isinstance(data, str) else data
    if isinstance(file, ObjectPath):
        file.write_bytes(data)
    else:
        _write_unfinished(file, data).replace(file)


def _write_unfinished(file: Path, data: bytes) -> Path:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with open(unfinished, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return unfinished


def list_files(directory: AnyPath) -> list[AnyPath]:
    """Returns the files in a directory and all below it, in order; none where there is none."""
    if isinstance(directory, ObjectPath):
        return [directory / key for key in directory._keys()]
    return sorted(path for path in directory.rglob("*") if path.is_file())


def remove_tree(directory: AnyPath) -> None:
    """Removes a directory with all below it; nothing where there is none."""
    if isinstance(directory, Path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        return
    with _one_line(directory, "delete"):
        bucket = _bucket(directory)
        prefix = f"{directory.key}/" if directory.key else ""
        for future in [bucket.write(f"{prefix}{key}", None) for key in directory._keys()]:
            future.result()


def upload(source: AnyPath, target: AnyPath) -> None:
    """Copies a file, or a directory with all below it, from any storage to any.

    A directory's own files come after those below it, for an index is one of them.
    """
    files = [source] if source.is_file() else list_files(source)
    for file in sorted(files, key=lambda file: -len(file.parts)):
        copy = target if file == source else target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(copy, file.read_bytes())


def download(path: AnyPath) -> Path:
    """Returns a local path of the same content, for libraries that read local files alone.

    What is in a bucket is copied once in a process, and removed when the process ends.
    """
    return path if isinstance(path, Path) else _downloaded(path)


@functools.cache
def _downloaded(path: ObjectPath) -> Path:
    local = Path(_temporary().name) / path.scheme / str(path._path)
    upload(path, local)
    return local


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="m2l-")


@contextlib.contextmanager
def local_output(path: AnyPath) -> Iterator[Path]:
    """Yields a local path for a library that writes local files; a bucket gets them at the end.

    Nothing is uploaded when the block ends by an exception.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="m2l-") as folder:
        yield Path(folder) / path.name
        upload(Path(folder) / path.name, path)


@functools.cache
def _store(scheme: str, bucket: str, settings: tuple[str | None, ...]) -> "ts.KvStore":
    import tensorstore as ts

    return ts.KvStore.open(kvstore_spec(ObjectPath(scheme, bucket))).result()


def _bucket(path: ObjectPath) -> "ts.KvStore":
    """Returns the key-value store of a whole bucket."""
    with _one_line(path, "open"):
        return _store(path.scheme, path.bucket, tuple(map(os.environ.get, _AWS_SETTINGS)))


_ADVICE = {
    "NOT_FOUND": "there is no bucket {bucket}; create it, or correct the address",
    "PERMISSION_DENIED": "{text}; use credentials that may {verb} it: {login}",
    "UNAUTHENTICATED": "{text}; use credentials that may {verb} it: {login}",
    "ABORTED": "{text}; check the network, {service}",
    "UNAVAILABLE": "{text}; check the network, {service}",
    "DEADLINE_EXCEEDED": "{text}; check the network, {service}",
    "UNKNOWN": "{text}; check {service}",
}
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_SERVICE = {"gs": "proxies and the bucket's name", "s3": "AWS_REGION and AWS_ENDPOINT_URL"}


@contextlib.contextmanager
def _one_line(path: ObjectPath, verb: str) -> Iterator[None]:
    """Turns TensorStore's errors about an address into an M2LError."""
    try:
        yield
    except (ValueError, NotImplementedError) as cause:
        # CODE: text [detail='...'] [...]
        text = str(cause).split(" [", 1)[0]
        code, _, reason = text.partition(": ")
        if code not in _ADVICE:
            code, reason = "", text
        advice = _ADVICE.get(code, "{text}").format(
            bucket=f"{path.scheme}://{path.bucket}",
            verb=verb,
            text=reason,
            login=_LOGIN[path.scheme],
            service=_SERVICE[path.scheme],
        )
        raise M2LError(f"{path}: cannot {verb} it: {advice}") from cause


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
