"""A file system that forgets what was not synced when it is told to: real power cuts for a real server.

    python -m tests.support.powercut_fs MOUNT_POINT CONTROL_SOCKET [--limit BYTES]

One thread, one request at a time: the order of requests is the order of the disk. `powercut_disk` says what survives a
cut. Every file is opened with FOPEN_DIRECT_IO and no name or attribute may be cached, so each write arrives here before
its system call returns and nothing outlives a cut in the kernel; there is no mmap in exchange.

Control (`powercut_control.PowerCutDisk` is the client): one JSON object a line, answered by one.
    {"do": "freeze", "after": N}   let N more changing requests through, then hold every request; answered when frozen
    {"do": "cut", "how": "drop"|"torn", "seed": N}   lose what was not synced; held requests and all open files: EIO
    {"do": "fault", "path": P, "ops": [...], "errno": N}   requests at or below P fail; errno 0: they hang until "clear"
    {"do": "clear"}   no faults any more; requests that hang go on
    {"do": "limit", "bytes": N}    the size of the file system
    {"do": "stat"}
"""

import argparse
import errno
import json
import os
import random
import selectors
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from tests.support import powercut_wire as wire
from tests.support.powercut_disk import PAGE_BYTES, Cut, Disk, Inode, failure
from tests.support.powercut_wire import Op

LIMIT_BYTES_DEFAULT: Final = 16 << 30
CHANGES: Final = frozenset(
    {
        Op.SETATTR, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK, Op.WRITE, Op.FSYNC,
        Op.FSYNCDIR, Op.SYNCFS, Op.CREATE, Op.FALLOCATE,
    }
)  # fmt: skip
NEVER_HELD: Final = frozenset(
    {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.RELEASE, Op.RELEASEDIR, Op.INIT, Op.DESTROY}
)


@dataclass(slots=True)
class Request:
    """One request of the kernel, its body still packed."""

    op: int
    unique: int
    node: int
    body: memoryview


@dataclass(slots=True)
class Handle:
    """An open file or directory; `listing` is a directory's contents when it was opened."""

    node: Inode
    listing: list[tuple[bytes, Inode]]


@dataclass(slots=True)
class Fault:
    """Requests at or below `path` whose name is in `ops` fail with `number`, or hang if it is 0."""

    path: str
    ops: frozenset[int]
    number: int


class Hang(Exception):
    """This request gets no answer for now."""


class Daemon:
    """Requests of the kernel and of the control socket, in one loop."""

    def __init__(self, limit_bytes: int) -> None:
        self.disk = Disk(limit_bytes)
        self.nodes: dict[int, Inode] = {1: self.disk.root}
        self.lookups: Counter[int] = Counter()
        self.handles: dict[int, Handle] = {}
        self.next_handle = 1
        self.faults: list[Fault] = []
        self.hanging: list[Request] = []
        self.changes_until_freeze: int | None = None
        self.frozen: list[Request] | None = None
        self.freeze_waiters: list[Callable[[], None]] = []
        self.counts: Counter[str] = Counter()
        self.fuse = -1
        self.table: dict[int, Callable[[Request], bytes | list[bytes] | None]] = {
            op: getattr(self, f"do_{op.name.lower()}") for op in Op
        }

    # The kernel's side

    def receive(self) -> bool:
        """Take one request; False when the mount is gone."""
        try:
            data = os.read(self.fuse, wire.REQUEST_BYTES_MAX)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return False
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                return True
            raise
        _, op, unique, node, *_ = wire.IN_HEADER.unpack_from(data)
        self.take(Request(op, unique, node, memoryview(data)[wire.IN_HEADER.size :]))
        return True

    def take(self, request: Request) -> None:
        """Serve a request, or hold it while the disk is frozen."""
        if request.op not in NEVER_HELD:
            if self.changes_until_freeze == 0:
                self.freeze()
            if self.frozen is not None:
                self.frozen.append(request)
                return
            if self.changes_until_freeze is not None and request.op in CHANGES:
                self.changes_until_freeze -= 1
        self.serve(request)

    def serve(self, request: Request) -> None:
        serve = self.table.get(request.op)
        try:
            if serve is None:
                raise failure(errno.ENOSYS)
            if self.faults:
                self.meet_fault(request)
            answer = serve(request)
        except Hang:
            self.hanging.append(request)
            return
        except OSError as error:
            self.answer(request, error.errno or errno.EIO)
            return
        self.counts[Op(request.op).name.lower()] += 1
        if answer is not None:
            self.answer(request, 0, answer if isinstance(answer, list) else [answer])

    def answer(self, request: Request, error: int, parts: list[bytes] | None = None) -> None:
        parts = parts or []
        head = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + sum(map(len, parts)), -error, request.unique)
        try:
            os.writev(self.fuse, [head, *parts])
        except OSError as gone:
            if gone.errno not in (errno.ENOENT, errno.ENODEV):  # the caller was killed, or the mount is gone
                raise

    def meet_fault(self, request: Request) -> None:
        if request.op in NEVER_HELD:
            return
        node = self.nodes.get(request.node)
        path = node.path() if node is not None else ""
        if request.op in (Op.LOOKUP, Op.UNLINK, Op.RMDIR, Op.MKDIR, Op.CREATE, Op.RENAME, Op.RENAME2, Op.LINK):
            path += "/"
        for fault in self.faults:
            if request.op in fault.ops and (path + "/").lstrip("/").startswith(fault.path + "/"):
                if fault.number:
                    raise failure(fault.number)
                raise Hang

    def node_of(self, request: Request) -> Inode:
        node = self.nodes.get(request.node)
        if node is None:
            raise failure(errno.ESTALE)
        return node

    def handle_of(self, number: int) -> Handle:
        """An open file; one from before a cut is gone."""
        handle = self.handles.get(number)
        if handle is None:
            raise failure(errno.EIO)
        return handle

    def attributes(self, node: Inode) -> bytes:
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        size = PAGE_BYTES if node.is_directory else node.size_bytes
        return wire.ATTR.pack(
            node.number, size, len(node.pages) * (PAGE_BYTES // 512), seconds, seconds, seconds,
            nanoseconds, nanoseconds, nanoseconds, node.mode, node.links, os.getuid(), os.getgid(), 0, PAGE_BYTES, 0,
        )  # fmt: skip

    def entry(self, node: Inode) -> bytes:
        """The answer that makes a node known to the kernel; no name or attribute is to be cached."""
        self.nodes[node.number] = node
        self.lookups[node.number] += 1
        return wire.ENTRY_HEAD.pack(node.number, 0, 0, 0, 0, 0) + self.attributes(node)

    def open_node(self, node: Inode, listing: list[tuple[bytes, Inode]] | None = None) -> bytes:
        number = self.next_handle
        self.next_handle += 1
        self.handles[number] = Handle(node, listing or [])
        self.disk.opened(node)
        return wire.OPEN_OUT.pack(number, 0 if node.is_directory else wire.OPEN_DIRECT_IO, 0)

    def do_init(self, request: Request) -> bytes:
        _, minor, readahead, flags = wire.INIT_IN.unpack_from(request.body)
        wanted = wire.ASYNC_READ | wire.BIG_WRITES | wire.PARALLEL_DIROPS | wire.MAX_PAGES
        return wire.INIT_OUT.pack(
            7, min(minor, wire.KERNEL_MINOR), readahead, flags & wanted, 64, 48, wire.WRITE_BYTES_MAX, 1,
            wire.WRITE_BYTES_MAX // PAGE_BYTES, 0, 0, *[0] * 7,
        )  # fmt: skip

    def do_destroy(self, request: Request) -> bytes:
        return b""

    def do_interrupt(self, request: Request) -> None:
        """A killed caller waits until its request is answered: `cut` and `clear` do."""

    def do_forget(self, request: Request) -> None:
        self.forget(request.node, wire.HANDLE_IN.unpack_from(request.body)[0])

    def do_batch_forget(self, request: Request) -> None:
        for node, count in wire.FORGET_ONE.iter_unpack(request.body[8:]):
            self.forget(node, count)

    def forget(self, number: int, count: int) -> None:
        self.lookups[number] -= count
        if self.lookups[number] <= 0 and number != 1:
            del self.lookups[number]
            self.nodes.pop(number, None)

    def do_lookup(self, request: Request) -> bytes:
        return self.entry(self.disk.lookup(self.node_of(request), _name(request.body)))

    def do_getattr(self, request: Request) -> bytes:
        return wire.ATTR_HEAD.pack(0, 0, 0) + self.attributes(self.node_of(request))

    def do_setattr(self, request: Request) -> bytes:
        node = self.node_of(request)
        valid, _, _, size, _, _, mtime, _, _, mtime_ns, _, mode, *_ = wire.SETATTR_IN.unpack_from(request.body)
        if valid & wire.SET_SIZE:
            self.disk.truncate(node, size, time.time_ns())
        if valid & wire.SET_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & wire.SET_MTIME:
            node.mtime_ns = time.time_ns() if valid & wire.SET_MTIME_NOW else mtime * 10**9 + mtime_ns
        return self.do_getattr(request)

    def do_mknod(self, request: Request) -> bytes:
        mode, _, umask, _ = wire.MKNOD_IN.unpack_from(request.body)
        if not stat.S_ISREG(mode):
            raise failure(errno.EPERM)
        return self.entry(self.make(request, wire.MKNOD_IN.size, mode & ~umask))

    def do_mkdir(self, request: Request) -> bytes:
        mode, umask = wire.MKDIR_IN.unpack_from(request.body)
        return self.entry(self.make(request, wire.MKDIR_IN.size, stat.S_IFDIR | stat.S_IMODE(mode & ~umask)))

    def do_create(self, request: Request) -> bytes:
        _, mode, umask, _ = wire.CREATE_IN.unpack_from(request.body)
        node = self.make(request, wire.CREATE_IN.size, stat.S_IFREG | stat.S_IMODE(mode & ~umask))
        return self.entry(node) + self.open_node(node)

    def make(self, request: Request, name_at: int, mode: int) -> Inode:
        return self.disk.create(self.node_of(request), _name(request.body[name_at:]), mode, time.time_ns())

    def do_unlink(self, request: Request) -> bytes:
        self.disk.unlink(self.node_of(request), _name(request.body), of_directory=False)
        return b""

    def do_rmdir(self, request: Request) -> bytes:
        self.disk.unlink(self.node_of(request), _name(request.body), of_directory=True)
        return b""

    def do_rename(self, request: Request) -> bytes:
        return self.rename(request, wire.RENAME_IN.unpack_from(request.body)[0], 0, wire.RENAME_IN.size)

    def do_rename2(self, request: Request) -> bytes:
        target, flags, _ = wire.RENAME2_IN.unpack_from(request.body)
        return self.rename(request, target, flags, wire.RENAME2_IN.size)

    def rename(self, request: Request, target: int, flags: int, names_at: int) -> bytes:
        if flags & ~wire.RENAME_NOREPLACE:
            raise failure(errno.EINVAL)
        old, new, _ = bytes(request.body[names_at:]).split(b"\0")
        source = self.node_of(request)
        self.disk.rename(source, old, self.nodes[target], new, replace=not flags & wire.RENAME_NOREPLACE)
        return b""

    def do_link(self, request: Request) -> bytes:
        node = self.nodes[wire.LINK_IN.unpack_from(request.body)[0]]
        self.disk.link(node, self.node_of(request), _name(request.body[wire.LINK_IN.size :]))
        return self.entry(node)

    def do_open(self, request: Request) -> bytes:
        return self.open_node(self.node_of(request))

    def do_opendir(self, request: Request) -> bytes:
        node = self.node_of(request)
        parent = node.parent or node
        return self.open_node(node, [(b".", node), (b"..", parent), *sorted(node.entries.items())])

    def do_release(self, request: Request) -> bytes:
        handle = self.handles.pop(wire.HANDLE_IN.unpack_from(request.body)[0], None)
        if handle is not None:
            self.disk.closed(handle.node)
        return b""

    do_releasedir = do_release

    def do_read(self, request: Request) -> bytes:
        number, offset, size, *_ = wire.READ_IN.unpack_from(request.body)
        return self.disk.read(self.handle_of(number).node, offset, size)

    def do_readdir(self, request: Request) -> bytes:
        number, offset, size, *_ = wire.READ_IN.unpack_from(request.body)
        out = bytearray()
        for index, (name, node) in enumerate(self.handle_of(number).listing[offset:], offset + 1):
            one = wire.DIRENT.pack(node.number, index, len(name), stat.S_IFMT(node.mode) >> 12) + name
            one += bytes(-len(one) % 8)
            if len(out) + len(one) > size:
                break
            out += one
        return bytes(out)

    def do_write(self, request: Request) -> bytes:
        number, offset, size, _, _, flags, _ = wire.WRITE_IN.unpack_from(request.body)
        data = request.body[wire.WRITE_IN.size :]
        assert isinstance(size, int)
        assert len(data) == size
        node = self.handle_of(number).node
        self.disk.write(node, offset, data, time.time_ns(), durable=bool(flags & os.O_DSYNC))
        return size.to_bytes(4, "little") + bytes(4)

    def do_fallocate(self, request: Request) -> bytes:
        number, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(request.body)
        node = self.handle_of(number).node
        keep_size = bool(mode & wire.FALLOC_KEEP_SIZE)
        kind = mode & ~wire.FALLOC_KEEP_SIZE
        if kind not in (0, wire.FALLOC_PUNCH_HOLE, wire.FALLOC_ZERO_RANGE):
            raise failure(errno.EOPNOTSUPP)
        if kind:
            self.disk.punch(node, offset, length, time.time_ns())
        if kind != wire.FALLOC_PUNCH_HOLE:
            self.disk.allocate(node, offset, length, keep_size=keep_size)
        return b""

    def do_fsync(self, request: Request) -> bytes:
        self.disk.sync_file(self.handle_of(wire.HANDLE_IN.unpack_from(request.body)[0]).node)
        return b""

    def do_fsyncdir(self, request: Request) -> bytes:
        self.disk.sync_directory(self.handle_of(wire.HANDLE_IN.unpack_from(request.body)[0]).node)
        return b""

    def do_syncfs(self, request: Request) -> NoReturn:
        """Refused: who relied on a sync of the whole file system would pay for other people's data on a real one."""
        raise failure(errno.ENOSYS)

    def do_statfs(self, request: Request) -> bytes:
        total = self.disk.limit_bytes // PAGE_BYTES
        free = max(0, (self.disk.limit_bytes - self.disk.used_bytes) // PAGE_BYTES)
        return wire.STATFS_OUT.pack(total, free, free, 1 << 20, 1 << 19, PAGE_BYTES, 255, PAGE_BYTES, 0, *[0] * 6)

    # The control side

    def freeze(self) -> None:
        self.changes_until_freeze = None
        self.frozen = []
        for tell in self.freeze_waiters:
            tell()
        self.freeze_waiters = []

    def control(self, command: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        """Obey one command; `tell` its answer, perhaps later."""
        match command:
            case {"do": "freeze", "after": int(count)}:
                self.freeze_waiters.append(lambda: tell({"frozen": True}))
                if count:
                    self.changes_until_freeze = count
                else:
                    self.freeze()
            case {"do": "cut", "how": str(how), "seed": int(seed)}:
                tell(self.cut(Cut(how), seed))
            case {"do": "fault", "path": str(path), "ops": list(ops), "errno": int(number)}:
                known = frozenset(Op[name.upper()].value for name in ops)
                self.faults.append(Fault(path.strip("/"), known, number))
                tell({})
            case {"do": "clear"}:
                self.faults = []
                waiting, self.hanging = self.hanging, []
                for request in waiting:
                    self.take(request)
                tell({"released": len(waiting)})
            case {"do": "limit", "bytes": int(limit)}:
                self.disk.limit_bytes = limit
                tell({})
            case {"do": "stat"}:
                tell(
                    {
                        "frozen": self.frozen is not None,
                        "hanging": len(self.hanging),
                        "used_bytes": self.disk.used_bytes,
                        "requests": dict(self.counts),
                    }
                )
            case _:
                tell({"error": f"unknown command {command}"})

    def cut(self, how: Cut, seed: int) -> dict[str, Any]:
        held = (self.frozen or []) + self.hanging
        self.frozen, self.hanging, self.changes_until_freeze = None, [], None
        report = self.disk.cut(how, random.Random(seed))
        self.handles.clear()
        for request in held:
            self.answer(request, errno.EIO)
        return {
            "held": len(held),
            "pages_unsynced": report.pages_unsynced,
            "pages_lost": report.pages_lost,
            "pages_torn": report.pages_torn,
            "sizes_lost": report.sizes_lost,
            "names_unsynced": report.names_unsynced,
            "names_lost": report.names_lost,
        }


class Controller:
    """One connection of the control socket."""

    def __init__(self, daemon: Daemon, connection: socket.socket) -> None:
        self.daemon = daemon
        self.connection = connection
        self.received = b""

    def ready(self) -> bool:
        data = self.connection.recv(65536)
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            self.daemon.control(json.loads(line), self.tell)
        return bool(data)

    def tell(self, answer: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(answer).encode() + b"\n")


def _name(body: memoryview) -> bytes:
    return bytes(body).partition(b"\0")[0]


def serve(mount_point: str, control_path: str, limit_bytes: int) -> None:
    """Mount and serve until the mount is taken away."""
    daemon = Daemon(limit_bytes)
    daemon.fuse, keeper = wire.mount(mount_point)
    os.set_blocking(daemon.fuse, False)
    with keeper, selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        selector.register(daemon.fuse, selectors.EVENT_READ)
        while not daemon.counts["init"]:
            selector.select()
            daemon.receive()
        listener.bind(control_path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == daemon.fuse:
                    if not daemon.receive():
                        return
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    selector.register(connection, selectors.EVENT_READ, Controller(daemon, connection))
                elif not key.data.ready():
                    selector.unregister(key.fileobj)
                    key.data.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A file system that drops unsynced bytes and names on command.")
    parser.add_argument("mount_point")
    parser.add_argument("control_socket")
    parser.add_argument("--limit", type=int, default=LIMIT_BYTES_DEFAULT, metavar="BYTES")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(arguments.mount_point, arguments.control_socket, arguments.limit)


if __name__ == "__main__":
    main()
