"""The inside of the sandbox: two processes, one for a program and one for its tests, each isolated.

Started by `m2l.evaluation.sandbox` as a process of its own; needs nothing but the standard library
and the files that its arguments name, `exchange.py` and `execution.py`. The process of the tests
alone reads the job and writes the verdict. The process of the program is forked before the job is
read; it receives source and calls, and answers with values. All isolation is active before a line
of either is compiled. Where this machine lacks a part of it, both end with its name, and nothing
runs. bubblewrap is no substitute: started by root, it leaves shmget and socketpair open and the
number of processes unlimited.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x1, 0x2, 0x4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_CAPSET_VERSION = 0x20080522
_NOBODY = 65534
_MAX_PROCESSES = 128
"""Threads of a program, its first one included."""

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _numbers(table: str) -> dict[str, tuple[int | None, ...]]:
    rows = (row.split() for row in table.split(","))
    return {name: tuple(int(n) if n != "-" else None for n in numbers) for name, *numbers in rows}


# System calls and their numbers on each of the two. But for the four that are looked into, what a
# program that computes does not need: new processes and programs, sockets and message queues,
# memory that outlives its mapping, locks, watches, other processes' memory and signals, mounts,
# namespaces, the kernel's own settings.
_SYSTEM_CALLS = _numbers("""
    clone 56 220, clone3 435 435, fcntl 72 25, prctl 157 167,
    execve 59 221, execveat 322 281, fork 57 -, vfork 58 -,
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202,
    accept4 288 242, sendto 44 206, sendmsg 46 211, sendmmsg 307 269, ptrace 101 117,
    process_vm_readv 310 270, process_vm_writev 311 271, kill 62 129, tkill 200 130,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424,
    setsid 112 157, setpgid 109 154, kcmp 312 272, mount 165 40, umount2 166 39,
    pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, bpf 321 280,
    keyctl 250 219, add_key 248 217, request_key 249 218, io_uring_setup 425 425, io_setup 206 0,
    perf_event_open 298 241, userfaultfd 323 282, init_module 175 105, finit_module 313 273,
    delete_module 176 106, kexec_load 246 104, reboot 169 142, swapon 167 224, swapoff 168 225,
    sethostname 170 161, setdomainname 171 162, open_by_handle_at 304 265,
    mount_setattr 442 442, move_mount 429 429, open_tree 428 428, fsopen 430 430,
    fsmount 432 432, pidfd_open 434 434, pidfd_getfd 438 438, process_madvise 440 440,
    quotactl 179 60, memfd_create 319 279, memfd_secret 447 447, mknod 133 -, mknodat 259 33,
    shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semctl 66 191, semop 65 193,
    semtimedop 220 192, msgget 68 186, msgctl 71 187, msgsnd 69 189, msgrcv 70 188,
    mq_open 240 180, mq_unlink 241 181, flock 73 32, inotify_init 253 -, inotify_init1 294 26,
    fanotify_init 300 262
""")
_CLONE_THREAD = 0x00010000
# F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE, F_NOTIFY.
_FCNTL_LOCKS = (6, 7, 37, 38, 1024, 1026)
_EPERM, _ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


class _Unavailable(Exception):
    """A part of the isolation that this machine lacks."""


@contextmanager
def _mechanism(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise _Unavailable(f"{name} ({error})") from error


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(source: str | None, target: str, flags: int, options: str | None = None) -> None:
    origin = (source or "none").encode()
    flag_bits, option_bytes = ctypes.c_ulong(flags), options and options.encode()
    _call(_libc.mount, origin, target.encode(), origin, flag_bits, option_bytes)


def _ids_of_user(user: int) -> list[int]:
    """Returns the user's own id and, for root, the one that a program runs as.

    The kernel does not limit root's processes. A container may map no second id: its root is
    another user of the machine, or the limit turns out not to be one.
    """
    if user != 0:
        return [user]
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    mapped = any(first <= _NOBODY < first + count for first, _, count in ranges)
    return [0, _NOBODY] if mapped else [0]


def _write_id_maps(process: int, users: list[int], groups: list[int]) -> None:
    texts = [(name, ids) for name, ids in (("uid_map", users), ("gid_map", groups))]
    if len(users) == 1:
        with open(f"/proc/{process}/setgroups", "w") as file:
            file.write("deny")
    for name, ids in texts:
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write("".join(f"{number} {number} 1\n" for number in ids))


def _own_namespaces() -> int:
    """Leaves the network, the other processes and the mounts; returns the user id to run as."""
    users = _ids_of_user(os.getuid())
    groups = [os.getgid()] if len(users) == 1 else [os.getgid(), _NOBODY]
    process, (unshared, signal_unshared) = os.getpid(), os.pipe()
    mapper = os.fork()  # two ids can only be mapped by a process outside the namespace
    if mapper == 0:
        os.close(signal_unshared)
        failed = 1
        try:
            if os.read(unshared, 1):
                _write_id_maps(process, users, groups)
                failed = 0
        finally:
            os._exit(failed)
    try:
        _call(_libc.unshare, _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
        os.write(signal_unshared, b"1")
    finally:
        os.close(signal_unshared)
        os.close(unshared)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise OSError("the user id cannot be mapped")
    return users[-1]


def _visible_paths() -> list[str]:
    """Returns what a program can read: the system's libraries and Python with its packages."""
    packages = [path for path in sys.path if os.path.basename(path).endswith("-packages")]
    paths: list[str] = []
    for path in sorted({*_SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, *packages}):
        inside = any(
            path.startswith(f"{folder}/") for folder in paths if not os.path.islink(folder)
        )
        if os.path.lexists(path) and not inside and path != "/":
            paths.append(path)
    return paths


def _read_only(folder: str, size: int, user: int) -> None:
    """Makes the root a new one: `_visible_paths`, read-only, and /tmp, empty, of `size` bytes."""
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=1000,mode=0755")
    for name in ("proc", "tmp"):
        os.mkdir(f"{folder}/{name}")
    for path in (*_visible_paths(), os.devnull):
        target = f"{folder}{path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "x").close()
        _mount(path, target, _MS_BIND | _MS_REC)
    attributes = struct.pack("<4Q", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    path = (_AT_FDCWD, folder.encode(), _AT_RECURSIVE)
    _call(_libc.syscall, _MOUNT_SETATTR, *path, attributes, len(attributes))
    options = f"size={size},nr_inodes=1000,mode=0700,uid={user}"
    _mount("tmpfs", f"{folder}/tmp", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(folder)
    _call(_libc.syscall, _PIVOT_ROOT[platform.machine()], b".", b".")
    _call(_libc.umount2, b".", _MNT_DETACH)
    os.chdir("/tmp")


def _become(user: int) -> None:
    """Gives up root's id for `user`, which has to be able to read Python's own files."""
    if os.getuid() != user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for path in (os.path.dirname(os.__file__), *_visible_paths()):
        if not os.access(path, os.R_OK):
            raise OSError(f"user {user} cannot read {path}; start m2l as another user than root")


def _limits(seconds: int, memory: int, file: int) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _limit_processes() -> None:
    """Limits threads.

    Raises:
        OSError: the kernel does not apply the limit to this user.
    """
    resource.setrlimit(resource.RLIMIT_NPROC, (1, _MAX_PROCESSES))
    try:
        child = os.fork()
    except BlockingIOError:
        resource.setrlimit(resource.RLIMIT_NPROC, (_MAX_PROCESSES, _MAX_PROCESSES))
        return
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    raise OSError("the kernel does not limit this user's processes")


def _no_capabilities() -> None:
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # the kernel knows no more
    header = struct.pack("<Ii", _CAPSET_VERSION, 0)
    _call(_libc.capset, header, bytes(24))
    _call(_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _system_calls() -> bytes:
    """Returns a filter in the kernel's BPF: what is forbidden fails; clone makes threads only."""
    machine = platform.machine()
    architecture = _ARCHITECTURES[machine]
    place = list(_ARCHITECTURES).index(machine)
    numbers = {name: pair[place] for name, pair in _SYSTEM_CALLS.items()}
    load, equal, at_least, all_of, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = _statement(give, 0x7FFF0000), _statement(give, 0x80000000)
    refuse = _statement(give, 0x00050000 | _EPERM)
    program = [
        _statement(load, 4),
        _statement(equal, architecture, 1, 0),
        kill,
        _statement(load, 0),
        _statement(at_least, 0x40000000, 0, 1),  # another calling convention's numbers
        kill,
        # glibc goes back to clone, whose flags can be read here, where there is no clone3.
        _statement(equal, numbers["clone3"], 0, 1),
        _statement(give, 0x00050000 | _ENOSYS),
        _statement(equal, numbers["clone"], 0, 4),
        _statement(load, 16),
        _statement(all_of, _CLONE_THREAD, 0, 1),
        allow,
        refuse,
    ]
    for name, offset, values in (
        ("fcntl", 24, _FCNTL_LOCKS),
        ("prctl", 16, (_PR_SET_PDEATHSIG,)),
    ):
        program += [
            _statement(equal, numbers[name], 0, 2 + 2 * len(values)),
            _statement(load, offset),
        ]
        for value in values:
            program += [_statement(equal, value, 0, 1), refuse]
        program.append(allow)
    for name, number in numbers.items():
        if number is not None and name not in ("clone", "clone3", "fcntl", "prctl"):
            program += [_statement(equal, number, 0, 1), refuse]
    return b"".join([*program, allow])


def _filter_system_calls() -> None:
    code = ctypes.create_string_buffer(_system_calls())
    length = (len(code) - 1) // 8
    program = struct.pack("@HP", length, ctypes.addressof(code))
    _call(_libc.prctl, _PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0)


def _isolate(folder: str, seconds: int, memory: int, file: int) -> None:
    """Isolates a new process, in which alone it returns; this one ends as that one does.

    Raises:
        _Unavailable: this machine lacks one of the mechanisms.
    """
    with _mechanism("namespaces of its own, without a network"):
        user = _own_namespaces()
    inner = os.fork()  # the first process of the new namespace: all others end with it
    if inner:
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    with _mechanism("file systems that are read-only"):
        _read_only(folder, file, user)
    with _mechanism("a user without privileges"):
        _become(user)
    with _mechanism("an end together with its parent"):
        _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with _mechanism("limits"):
        _limits(seconds, memory, file)
        _limit_processes()
    with _mechanism("no capabilities"):
        _no_capabilities()
    with _mechanism("a filter of system calls"):
        _filter_system_calls()


def _read_line(descriptor: int) -> bytes:
    """Reads up to a newline and not a byte further."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def _load(path: str) -> types.ModuleType:
    """Returns the module in a file, as of this package, without what its parents import."""
    for package in ("m2l", "m2l.evaluation", "m2l.evaluation.sandbox"):
        sys.modules.setdefault(package, types.ModuleType(package))
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(f"m2l.evaluation.sandbox.{name}", path)
    module = importlib.util.module_from_spec(spec)
    setattr(sys.modules["m2l.evaluation.sandbox"], name, module)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Reads settings and a job, a line of JSON each, from standard input.

    Writes a line of JSON to standard output: the verdict, or the mechanism that this machine lacks.
    """
    settings = json.loads(_read_line(0))
    exchange, execution = map(_load, sys.argv[1:])
    sys.dont_write_bytecode = True
    nothing = os.open(os.devnull, os.O_RDWR)
    calls, values = os.pipe(), os.pipe()

    program = os.fork()
    if program == 0:
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.close(calls[1])
        os.close(values[0])
        connection = exchange.Connection(calls[0], values[1])
        try:
            _isolate(**settings)
        except _Unavailable as error:
            connection.send(["lacks", str(error)])
            os._exit(1)
        connection.send(["ready"])
        execution.serve_program(connection)
        os._exit(0)

    tests = os.fork()
    if tests == 0:
        job, result_descriptor = json.loads(sys.stdin.buffer.read()), os.dup(1)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.close(calls[0])
        os.close(values[1])
        try:
            _isolate(**settings)
            result = execution.run_tests(exchange.Connection(values[0], calls[1]), job)
        except _Unavailable as error:
            result = {"lacks": str(error)}
        os.write(result_descriptor, json.dumps(result).encode())
        os._exit(0 if result else 1)

    for descriptor in (*calls, *values):
        os.close(descriptor)
    _, status = os.waitpid(tests, 0)
    code = os.waitstatus_to_exitcode(status) & 0xFF
    if code != 1:  # else the program's process ended first, and its status says how
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF if code == 1 else code)


if __name__ == "__main__":
    main()
