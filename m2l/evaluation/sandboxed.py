"""The inside of the sandbox: shuts itself in, then runs the program it is handed.

Started by `m2l.evaluation.sandbox` as a process of its own; needs nothing but the standard library.
Nothing here trusts the program: all walls stand before a line of it is compiled. A wall that this
machine cannot put up ends it with the wall's name, for a sandbox with a hole is none.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x1, 0x2, 0x4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same on every architecture
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_CAPSET_VERSION = 0x20080522

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _numbers(table: str) -> dict[str, tuple[int | None, ...]]:
    rows = (row.split() for row in table.split(","))
    return {name: tuple(int(n) if n != "-" else None for n in numbers) for name, *numbers in rows}


# System calls and their numbers on each of the two. But for the first two, what a program that
# computes does not need: new processes and programs, sockets of any kind, other processes' memory,
# mounts, namespaces, the kernel's own settings.
_SYSTEM_CALLS = _numbers("""
    clone 56 220, clone3 435 435, execve 59 221, execveat 322 281, fork 57 -, vfork 58 -,
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202,
    accept4 288 242, sendto 44 206, sendmsg 46 211, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, kill 62 129, tkill 200 130, mount 165 40, umount2 166 39,
    pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, bpf 321 280,
    keyctl 250 219, add_key 248 217, request_key 249 218, io_uring_setup 425 425,
    perf_event_open 298 241, userfaultfd 323 282, init_module 175 105, finit_module 313 273,
    delete_module 176 106, kexec_load 246 104, reboot 169 142, swapon 167 224, swapoff 168 225,
    sethostname 170 161, setdomainname 171 162, open_by_handle_at 304 265,
    mount_setattr 442 442, move_mount 429 429, open_tree 428 428, fsopen 430 430,
    fsmount 432 432, pidfd_open 434 434, pidfd_getfd 438 438, process_madvise 440 440,
    quotactl 179 60, memfd_create 319 279, mknodat 259 33
""")
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


class _NoWall(Exception):
    """A wall that cannot be put up."""


@contextmanager
def _wall(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise _NoWall(f"{name} ({error})") from error


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(kind: str | None, where: str, flags: int, data: str | None = None) -> None:
    texts = (kind or "none", where, kind or "none", data)
    source, target, of_type, options = (text and text.encode() for text in texts)
    _call(_libc.mount, source, target, of_type, ctypes.c_ulong(flags), options)


def _own_namespaces() -> None:
    """No network, no other process, and mounts of one's own; whoever one is."""
    user, group = os.getuid(), os.getgid()
    _call(_libc.unshare, _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _read_only(folder: str, size: int) -> None:
    """Every file system read-only, without devices; `folder` an empty one of `size` bytes."""
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    attributes = struct.pack("<4Q", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    _call(
        _libc.syscall, _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)
    )
    _mount("tmpfs", folder, _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=1000,mode=0700")
    _mount("tmpfs", "/proc", _MS_NOSUID | _MS_NODEV | 1, "size=4096")
    os.chdir(folder)


def _limits(seconds: int, memory: int, file: int) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


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
    """A filter in the kernel's BPF: what is forbidden fails; clone makes threads only."""
    machine = platform.machine()
    architecture = _ARCHITECTURES[machine]
    place = list(_ARCHITECTURES).index(machine)
    numbers = {name: of_each[place] for name, of_each in _SYSTEM_CALLS.items()}
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
    for name, number in numbers.items():
        if number is not None and name not in ("clone", "clone3"):
            program += [_statement(equal, number, 0, 1), refuse]
    return b"".join([*program, allow])


def _filter_system_calls() -> None:
    code = ctypes.create_string_buffer(_system_calls())
    length = (len(code) - 1) // 8
    program = struct.pack("@HP", length, ctypes.addressof(code))
    _call(_libc.prctl, _PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0)


def _run(program: str) -> str:
    """What became of the program: "passed", or its error."""
    try:
        exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the tests were not met
        return f"failed: {type(error).__name__}"
    return "passed"


def main() -> None:
    """Reads a job, one line of JSON, from standard input; writes the verdict to standard output."""
    job = json.loads(sys.stdin.readline())
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        with _wall("namespaces of its own, without a network"):
            _own_namespaces()
        inner = os.fork()  # the first process of the new namespace: all others end with it
        if inner:
            _, status = os.waitpid(inner, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        with _wall("an end together with its parent"):
            _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with _wall("file systems that are read-only"):
            _read_only(job["folder"], job["file"])
        with _wall("limits"):
            _limits(job["seconds"], job["memory"], job["file"])
        with _wall("no capabilities"):
            _no_capabilities()
        with _wall("a filter of system calls"):
            _filter_system_calls()
    except _NoWall as error:
        os.write(verdict, f"{job['word']} no wall: {error}".encode())
        os._exit(1)
    # The program is not told the word that its verdict has to begin with.
    os.write(verdict, f"{job.pop('word')} {_run(job.pop('program'))}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
