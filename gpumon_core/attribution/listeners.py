"""Finds the process of a listening socket, so that gpumon believes only the server itself, and no other program at
its port.

The kernel lists the sockets of a network namespace with their inodes in /proc/PID/net/tcp (proc_pid_net(5)), and
the sockets of a process in /proc/PID/fd. Only the inquirer's thread reads them.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from gpumon_core.attribution.files import read

# The listening sockets come first; a busy server has many more other sockets.
LARGEST_TABLE = 1 << 18
# The most descriptors and threads of a process, and the most processes below a server, to look at.
MOST_DESCRIPTORS = 8192
MOST_THREADS = 512
MOST_CHILDREN = 64
LISTENING = b"0A"
SOCKET = re.compile(r"socket:\[(\d{1,20})\]")
ANYWHERE = ("0.0.0.0", "::")

# own: the server's. foreign: another program's. none: no socket listens there. unknown: it cannot be read.
SocketOwner = Literal["own", "foreign", "none", "unknown"]
# A process, and its start in clock ticks; None where the start does not matter.
Member = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens; `uid` is the user that opened it."""

    address: str
    port: int
    uid: int
    inode: int


@dataclass(frozen=True, slots=True)
class PortOwner:
    """What listens at a port: the verdict, the address to ask at, and the sockets where they are the server's."""

    verdict: SocketOwner
    host: str
    inodes: frozenset[int] = frozenset()


def find(
    family: Sequence[Member],
    launcher: Member | None,
    host: str,
    port: int,
    proc: str = "/proc",
    known: frozenset[int] = frozenset(),
) -> PortOwner:
    """Whether the socket that listens at a host and port belongs to a server. The server is the `family`: the
    first is the process on the GPU, and the last may have more processes below it. `launcher` started them, and
    may have opened the socket for them. `known` are sockets that were found to be theirs before."""
    # At addresses of this network, the sockets of this network answer, even if the process has a network of its
    # own.
    is_here = host.startswith("127.") or host in addresses("self", proc)
    table = listeners("self" if is_here else family[0][0], proc)
    if table is None:
        return PortOwner("unknown", host)
    table = [one for one in table if one.port == port]
    if not table:
        return PortOwner("none", host)
    verdict: SocketOwner = "foreign"
    # A server that listens at one address only is asked at that address.
    for place in dict.fromkeys((host, *(one.address for one in table if one.address not in ANYWHERE))):
        if not is_here and place.startswith(("127.", "::1")):
            continue
        answering = _answering(table, place)
        inodes = frozenset(one.inode for one in answering)
        if not inodes:
            continue
        is_own = inodes <= known or _have(family, launcher, inodes, proc)
        if is_own:
            return PortOwner("own", place, inodes)
        if is_own is None and {one.uid for one in answering} <= _users(family, proc):
            verdict = "unknown"
    return PortOwner(verdict, host)


def _answering(table: Iterable[Listener], host: str) -> list[Listener]:
    """The sockets to which the kernel gives a connection: those of the address before those of all addresses."""
    for address in (host, *(ANYWHERE if ":" not in host else ANYWHERE[1:])):
        if found := [one for one in table if one.address == address]:
            return found
    return []


def addresses(pid: int | str, proc: str = "/proc") -> list[str]:
    """The addresses of a process's network, without loopback addresses: proc_pid_net(5), net/ipv4/fib_trie.c."""
    found: dict[str, None] = {}
    before = ""
    for line in (read(f"{proc}/{pid}/net/fib_trie", LARGEST_TABLE) or b"").decode("ascii", "replace").splitlines():
        # Local addresses are on the line before "host LOCAL".
        if "host LOCAL" in line:
            if before and not before.startswith("127."):
                found[before] = None
        elif "|--" in line:
            before = line.rpartition(" ")[2]
    return list(found)


def listeners(pid: int | str, proc: str = "/proc") -> list[Listener] | None:
    """The sockets that listen in a process's network namespace; None where it cannot be read."""
    found, was_read = [], False
    for name in ("tcp", "tcp6"):
        content = read(f"{proc}/{pid}/net/{name}", LARGEST_TABLE)
        was_read = was_read or content is not None
        for line in (content or b"").splitlines()[1:]:
            fields = line.split(None, 10)
            if len(fields) < 10 or fields[3] != LISTENING:
                continue
            try:
                address, _, port = fields[1].partition(b":")
                found.append(Listener(_address(address.decode()), int(port, 16), int(fields[7]), int(fields[9])))
            except (ValueError, OSError):
                # The last line may be incomplete.
                continue
    return found if was_read else None


def _address(digits: str) -> str:
    """An address from the tables, which write words of 32 bits in the byte order of the machine."""
    words = (int(digits[start : start + 8], 16) for start in range(0, len(digits), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    if len(packed) == 16 and packed.startswith(bytes(10) + b"\xff\xff"):
        packed = packed[12:]
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _have(family: Sequence[Member], launcher: Member | None, inodes: frozenset[int], proc: str) -> bool | None:
    """Whether sockets belong to these processes or to those below the last one; None where it cannot be read."""
    missing, may_be_read = set(inodes), True
    # After the end of one of them its PID may belong to another process.
    members = [pid for pid, start in family if start is None or started(pid, proc) == start]
    above = [] if launcher is None or started(launcher[0], proc) != launcher[1] else [launcher[0]]
    below = _below(family[-1][0], proc) if members and members[-1] == family[-1][0] else iter(())
    seen: set[int] = set()
    for pid in chain(members, above, below):
        if pid in seen:
            continue
        seen.add(pid)
        sockets = _sockets(pid, proc)
        if sockets is None:
            may_be_read = False
            continue
        missing -= sockets
        if not missing:
            return True
    return False if may_be_read else None


def _sockets(pid: int, proc: str) -> set[int] | None:
    """The inodes of the open sockets of a process."""
    found: set[int] = set()
    try:
        with os.scandir(f"{proc}/{pid}/fd") as entries:
            for number, entry in enumerate(entries):
                if number >= MOST_DESCRIPTORS:
                    break
                try:
                    link = SOCKET.fullmatch(os.readlink(entry.path))
                except OSError:
                    continue
                if link:
                    found.add(int(link[1]))
    except FileNotFoundError:
        return set()
    except OSError:
        return None
    return found


def _below(pid: int, proc: str) -> Iterator[int]:
    """The processes below a process, the nearest first."""
    waiting, seen = [pid], {pid}
    while waiting:
        parent = waiting.pop(0)
        try:
            threads = os.listdir(f"{proc}/{parent}/task")[:MOST_THREADS]
        except OSError:
            continue
        for thread in threads:
            for child in (read(f"{proc}/{parent}/task/{thread}/children", 65536) or b"").split():
                if child.isdigit() and int(child) not in seen:
                    if len(seen) > MOST_CHILDREN:
                        return
                    seen.add(int(child))
                    waiting.append(int(child))
                    yield int(child)


def started(pid: int, proc: str = "/proc") -> int | None:
    """A process's start in clock ticks since the boot: proc_pid_stat(5)."""
    stat = read(f"{proc}/{pid}/stat", 4096) or b""
    fields = stat[stat.rfind(b")") + 2 :].split(None, 20)
    return int(fields[19]) if len(fields) > 19 and fields[19].isdigit() else None


def _users(family: Sequence[Member], proc: str) -> set[int]:
    found = set()
    for pid, _ in family:
        try:
            found.add(os.stat(f"{proc}/{pid}").st_uid)
        except OSError:
            continue
    return found
