"""A file system in memory that can lose power: what `DirectoryBackend` runs on in the simulation.

Model. Every file has what the page cache shows and what the disk is sure to hold; between the two lies the ordered list
of its unsynced changes. Folders likewise: names as seen, names as durable, and one ordered list of unsynced changes.

- fdatasync/fsync(file): its content and size are durable; its name is not.
- pwritev with RWF_DSYNC: the sectors it touches and the size it needs are durable, nothing else.
- fsync(folder): the name changes in that folder are durable, with the earlier ones that they build on. A new folder's
  own name lies in the folder above and is not.
- failed fsync/fdatasync (the hook raised OSError): some of the writes reached the disk; all of them count as clean.
  The page cache shows them, later syncs skip them, O_DIRECT and POSIX_FADV_DONTNEED tell the truth.
- crash("kill"): descriptors and locks are gone, nothing else.
- crash("power"): each 512-byte sector holds some version between durable and seen; sizes and names stop anywhere that
  keeps their order (a rename is whole; changes that have no name or folder in common have no order). None, all, and a
  prefix come up on purpose.

Not modelled: threads (one call at a time), hard links of folders, permissions, times, holes (a file takes the space up
to the last byte that was written or allocated), space for names.
"""

import errno
import functools
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
NAME_CHANGES_MAX = 128
"""Unsynced name changes that are kept; the oldest becomes durable beyond that, as a journal's timer would make it."""

SYNCED_CHANGES_MAX = 64
"""Changes of a file that are kept as they came before the disk's content is made of them."""

_DATA, _SIZE = 0, 1


class Crash(BaseException):
    """The process or its host dies here. Raised by a hook, and again by every call until `FakeFileSystem.crash`.

    applied_bytes: if the call is a pwritev, that many bytes of it still reach the page cache.
    """

    def __init__(self, applied_bytes: int = 0) -> None:
        super().__init__("the process dies here")
        self.applied_bytes = applied_bytes


BeforeCall = Callable[[str, tuple[Any, ...]], int | None]
"""before_call(name, args): runs before each system call. It may raise Crash or OSError (with an attribute applied_bytes
for a pwritev that fails half-way), or return the most bytes that this preadv or pwritev is to move."""


class _File:
    """A regular file. `data` may be shorter than `size`: the rest reads as zeros.

    What the disk holds is `_disk` with the `_synced` changes applied; mostly nobody ever asks for it.
    """

    __slots__ = ("_disk", "_disk_size", "_synced", "changes", "data", "end", "ino", "links", "lost", "openers", "size")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.data = bytearray()
        self.size = 0
        self.changes: list[_Change] = []
        self.end = 0  # space is taken up to here
        self.links = 0
        self.openers = 0
        self.lost = False  # a sync failed: data shows what the disk may not have
        self._disk = bytearray()
        self._disk_size = 0
        self._synced: list[_Change] = []

    def write(self, offset: int, piece: bytes, durable: bool) -> None:
        _put_bytes(self.data, offset, piece)
        self.size = max(self.size, offset + len(piece))
        changes = self._synced if durable and not self.changes and not self.lost else self.changes
        changes.append((_DATA, offset, piece, self.size, durable))

    def resize(self, size: int) -> None:
        self.size = size
        del self.data[size:]
        self.changes.append((_SIZE, 0, b"", size, False))

    def disk(self) -> tuple[bytearray, int]:
        """What the disk is sure to hold; its size."""
        disk = self._disk
        for kind, offset, piece, size, _ in self._synced:
            if kind == _DATA:
                _put_bytes(disk, offset, piece)
            else:
                del disk[size:]
            self._disk_size = size
        self._synced.clear()
        return disk, self._disk_size

    def on_medium(self) -> bytes:
        """What the disk would hold were all dirty pages written out now."""
        if not self.lost:
            return bytes(self.data).ljust(self.size, b"\0")
        disk, size = self.disk()
        disk = bytearray(disk)
        for kind, offset, piece, size, _ in self.changes:
            if kind == _DATA:
                _put_bytes(disk, offset, piece)
            else:
                del disk[size:]
        return bytes(disk).ljust(size, b"\0")

    def sync(self) -> None:
        self._synced += self.changes
        self.changes.clear()
        if len(self._synced) > SYNCED_CHANGES_MAX:
            self.disk()

    def settle(self, rng: random.Random, *, sizes_kept: bool = False) -> None:
        """A power cut as far as the disk is concerned: some of the changes make it, the others never will.

        sizes_kept: ftruncate and fallocate all make it (the journal carries them, whatever became of the data).
        """
        if self.changes:
            disk, size = self.disk()
            self._disk, self._disk_size = _some_of(disk, size, self.changes, rng, sizes_kept)
            self.changes.clear()

    def cut(self, rng: random.Random) -> None:
        """A power cut: what is seen from now on is what the disk holds."""
        if self.changes or self.lost:
            self.settle(rng)
            disk, self.size = self.disk()
            self.data = bytearray(disk)
            self.lost = False
        self.end = _blocks(self.size)


_Change = tuple[int, int, bytes, int, bool]
"""kind, offset, bytes, size of the file afterwards, durable on its own (RWF_DSYNC)."""


class _Folder:
    """A folder: names as seen and names as on the disk."""

    __slots__ = ("disk", "ino", "links", "names", "parent", "unsynced")

    def __init__(self, ino: int, parent: "_Folder | None") -> None:
        self.ino = ino
        self.parent = parent or self
        self.names: dict[str, _Node] = {}
        self.disk: dict[str, _Node] = {}
        self.links = 2
        self.unsynced = 0  # name changes under way that concern it


_Node = _File | _Folder
_Key = tuple[_Folder, str]


class _NameChange:
    """One unsynced change of names, atomic. sets: what each name means afterwards (None: nothing)."""

    __slots__ = ("folders", "made", "removed", "sets")

    def __init__(self, sets: dict[_Key, _Node | None], made: _Folder | None, removed: _Folder | None) -> None:
        self.sets = sets
        self.folders = {folder for folder, _ in sets}
        self.made = made
        self.removed = removed
        for folder in self.folders:
            folder.unsynced += 1

    def apply(self) -> None:
        for folder in self.folders:
            folder.unsynced -= 1
        for (folder, name), node in self.sets.items():
            if node is None:
                folder.disk.pop(name, None)
            else:
                folder.disk[name] = node


class _Open:
    """An open file description."""

    __slots__ = ("direct", "node", "path", "writable")

    def __init__(self, node: _Node, path: str, flags: int) -> None:
        self.node = node
        self.path = path
        self.direct = bool(flags & os.O_DIRECT)
        self.writable = bool(flags & (os.O_WRONLY | os.O_RDWR))


class FakeFileSystem:
    """A `FileSystem` of `capacity_bytes` in memory. One seed and one sequence of calls give one result.

    rng: chooses what survives a power cut and which read_nowait misses.
    nowait_miss: share of RWF_NOWAIT reads that answer EAGAIN.
    device: st_dev of everything in it.
    takes_nowait, takes_dsync, takes_direct, takes_fallocate: False refuses with the errno that Linux uses.
    lies: fsync, fdatasync and RWF_DSYNC say that they succeeded and make nothing durable.
    Public attributes may be changed at any time. `counts` has the number of calls by name.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int = 1 << 40,
        rng: random.Random | None = None,
        nowait_miss: float = 0.0,
        device: int = 1,
        takes_nowait: bool = True,
        takes_dsync: bool = True,
        takes_direct: bool = True,
        takes_fallocate: bool = True,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.rng = rng or random.Random(0)
        self.nowait_miss = nowait_miss
        self.device = device
        self.takes_nowait = takes_nowait
        self.takes_dsync = takes_dsync
        self.takes_direct = takes_direct
        self.takes_fallocate = takes_fallocate
        self.lies = False
        self.before_call: BeforeCall | None = None
        self.counts: Counter[str] = Counter()
        self.taken_bytes = 0
        self._next_ino = 2
        self._next_fd = 1000
        self._root = _Folder(1, None)
        self._name_changes: list[_NameChange] = []
        self._fds: dict[int, _Open] = {}
        self._locks: dict[_File, _Open] = {}
        self._dying: Crash | None = None

    # for tests

    def make_folder(self, path: str) -> None:
        """A folder with all those above it, durable: where a zone lies. Runs no hook."""
        folder = self._root
        for name in _parts(path):
            node = folder.names.get(name)
            if node is None:
                node = _Folder(self._new_ino(), folder)
                folder.names[name] = folder.disk[name] = node
            assert isinstance(node, _Folder), path
            folder = node

    def crash(self, mode: str, rng: random.Random | None = None) -> None:
        """The process is gone ("kill") or the power fails ("power"). Every descriptor and lock is dead."""
        rng = rng or self.rng
        self._dying = None
        self._fds.clear()
        self._locks.clear()
        if mode == "power":
            self._cut_names(rng)
            for file in self._files():
                file.cut(rng)
        else:
            assert mode == "kill", mode
            for file in self._files():
                file.openers = 0
        self.taken_bytes = sum(file.end for file in self._files())

    def path_of(self, fd: int) -> str:
        """The path that `fd` was opened by, for hooks that pick their victim."""
        return self._fds[fd].path

    def open_count(self) -> int:
        """Descriptors now open."""
        return len(self._fds)

    def content(self, path: str) -> bytes:
        """What a reader of the file sees. Runs no hook."""
        file = self._find(path, None)
        assert isinstance(file, _File), path
        return bytes(file.data).ljust(file.size, b"\0")

    def size(self, path: str) -> int:
        """Bytes of the file. Runs no hook."""
        file = self._find(path, None)
        assert isinstance(file, _File), path
        return file.size

    def damage(self, path: str, offset: int, bits: int = 0xFF) -> None:
        """These bits of a byte of the file rot, on the disk and in the page cache."""
        file = self._find(path, None)
        assert isinstance(file, _File), path
        for content in (file.data, file.disk()[0]):
            if offset < len(content):
                content[offset] ^= bits

    def image(self) -> "Image":
        """A copy of everything as it is seen now. Nobody has a file open."""
        copies: dict[_File, _File] = {}
        return Image(_copy_of(self._root, None, copies))

    def restore(self, image: "Image") -> None:
        """Put an image back in place of everything, durably. Nobody has a file open."""
        copies: dict[_File, _File] = {}
        self._root = _copy_of(image.root, None, copies)
        self._name_changes = []
        self.taken_bytes = sum(file.end for file in self._files())

    def wipe(self, path: str) -> None:
        """The folder is a new, empty one, durably. Nobody has a file open."""
        folder, name = self._locate(path, None)
        self._name_changes = []
        folder.names.pop(name)
        folder.disk.pop(name, None)
        self.make_folder(path)
        self.taken_bytes = sum(file.end for file in self._files())

    def paths_below(self, path: str) -> list[str]:
        """Every file below a folder, relative to it, sorted. Runs no hook."""
        top = self._find(path, None)
        assert isinstance(top, _Folder), path
        found = []
        folders = [("", top)]
        while folders:
            above, folder = folders.pop()
            for name, node in folder.names.items():
                if isinstance(node, _Folder):
                    folders.append((f"{above}{name}/", node))
                else:
                    found.append(above + name)
        return sorted(found)

    def unsynced_bytes(self) -> int:
        """Bytes of all unsynced writes."""
        return sum(len(change[2]) for file in self._files() for change in file.changes if not change[4])

    # FileSystem: files

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._enter("open", path, flags, mode, dir_fd)
        folder, name = self._locate(path, dir_fd)
        node: _Node | None = folder.names.get(name) if name else folder
        if node is None:
            if not flags & os.O_CREAT:
                _fail(errno.ENOENT, path)
            fresh = _File(self._new_ino())
            node = folder.names.setdefault(name, fresh)
            if node is fresh:
                fresh.links = 1
                self._changed({(folder, name): fresh}, None, None)
            elif flags & os.O_EXCL:
                _fail(errno.EEXIST, path)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            _fail(errno.EEXIST, path)
        return self._open(node, path, flags)

    def reopen(self, fd: int, flags: int, /) -> int:
        self._enter("reopen", fd, flags)
        description = self._description(fd)
        return self._open(description.node, description.path, flags)

    def close(self, fd: int, /) -> None:
        self._enter("close", fd)
        description = self._description(fd)
        del self._fds[fd]
        node = description.node
        if isinstance(node, _File):
            if self._locks.get(node) is description:
                del self._locks[node]
            node.openers -= 1
            self._free_if_unused(node)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        limit = self._enter("preadv", fd, buffers, offset, flags)
        description = self._description(fd)
        file = _file_of(description)
        if flags & os.RWF_NOWAIT:
            if not self.takes_nowait:
                _fail(errno.EOPNOTSUPP, description.path)
            if self.nowait_miss and self.rng.random() < self.nowait_miss:
                _fail(errno.EAGAIN, description.path)
        if description.direct:
            length = sum(buffer.nbytes for buffer in buffers)
            if offset % SECTOR_BYTES or length % SECTOR_BYTES:
                _fail(errno.EINVAL, description.path)
            data: bytes | bytearray = file.on_medium()
        else:
            data = file.data
        size = file.size
        done = 0
        if limit is not None:
            size = min(size, offset + limit)
        for buffer in buffers:
            length = min(buffer.nbytes, size - offset)
            if length < 0:
                break
            piece = data[offset : offset + length]
            got = len(piece)
            buffer[:got] = piece
            if got < length:
                buffer[got:length] = bytes(length - got)
            offset += length
            done += length
            if length < buffer.nbytes:
                break
        return done

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        try:
            limit = self._enter("pwritev", fd, buffers, offset, flags)
        except (Crash, OSError) as error:
            applied_bytes = getattr(error, "applied_bytes", 0)
            if applied_bytes and fd in self._fds:
                file = _file_of(self._fds[fd])
                piece = b"".join(buffers)[:applied_bytes]
                self._take_space(file, offset + len(piece))
                file.write(offset, piece, False)
            raise
        description = self._description(fd)
        if not description.writable:
            _fail(errno.EBADF, description.path)
        file = _file_of(description)
        durable = bool(flags & os.RWF_DSYNC)
        if durable and not self.takes_dsync:
            _fail(errno.EOPNOTSUPP, description.path)
        durable = durable and not self.lies
        piece = b"".join(buffers)
        if limit is not None:
            piece = piece[:limit]
        if not piece:
            return 0
        end = offset + len(piece)
        if end > file.end:
            room = max(file.end, file.end + self._room_bytes())
            if end > room:
                if offset >= room:
                    _fail(errno.ENOSPC, description.path)
                piece = piece[: room - offset]
                end = room
            self._take_space(file, end)
        file.write(offset, piece, durable)
        return len(piece)

    def start_writeback(self, fd: int, offset: int, length: int, /) -> None:
        self._enter("start_writeback", fd, offset, length)
        _file_of(self._description(fd))

    def fdatasync(self, fd: int, /) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int, /) -> None:
        self._sync("fsync", fd)

    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None:
        self._enter("posix_fallocate", fd, offset, length)
        description = self._description(fd)
        if not description.writable:
            _fail(errno.EBADF, description.path)
        file = _file_of(description)
        if not self.takes_fallocate:
            _fail(errno.EOPNOTSUPP, description.path)
        end = offset + length
        if _blocks(end) - file.end > self._room_bytes():
            _fail(errno.ENOSPC, description.path)
        self._take_space(file, end)
        if end > file.size:
            file.resize(end)

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int, /) -> None:
        self._enter("posix_fadvise", fd, offset, length, advice)
        file = _file_of(self._description(fd))
        if advice == os.POSIX_FADV_DONTNEED and file.lost:
            end = offset + length if length else file.size
            medium = file.on_medium()[offset:end]
            _put_bytes(file.data, offset, medium.ljust(min(end, file.size) - offset, b"\0"))

    def ftruncate(self, fd: int, length: int, /) -> None:
        self._enter("ftruncate", fd, length)
        description = self._description(fd)
        if not description.writable:
            _fail(errno.EINVAL, description.path)
        file = _file_of(description)
        if length != file.size:
            file.resize(length)
        if _blocks(length) < file.end:
            self.taken_bytes -= file.end - _blocks(length)
            file.end = _blocks(length)

    # FileSystem: names

    def rename(self, src: str, dst: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._enter("rename", src, dst, src_dir_fd, dst_dir_fd)
        from_folder, from_name = self._locate(src, src_dir_fd)
        to_folder, to_name = self._locate(dst, dst_dir_fd)
        node = from_folder.names.get(from_name)
        if node is None:
            _fail(errno.ENOENT, src)
        former = to_folder.names.get(to_name)
        if former is node:
            return
        assert isinstance(node, _File), "folders are never renamed"
        if isinstance(former, _Folder):
            _fail(errno.EISDIR, dst)
        del from_folder.names[from_name]
        to_folder.names[to_name] = node
        self._changed({(from_folder, from_name): None, (to_folder, to_name): node}, None, None)
        if former is not None:
            former.links -= 1
            self._free_if_unused(former)

    def link(self, src: str, dst: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._enter("link", src, dst, src_dir_fd, dst_dir_fd)
        from_folder, from_name = self._locate(src, src_dir_fd)
        to_folder, to_name = self._locate(dst, dst_dir_fd)
        node = from_folder.names.get(from_name)
        if node is None:
            _fail(errno.ENOENT, src)
        assert isinstance(node, _File), "folders are never linked"
        # One dictionary call decides, so that threads racing for a name have one winner here too.
        if to_name in to_folder.names or to_folder.names.setdefault(to_name, node) is not node:
            _fail(errno.EEXIST, dst)
        node.links += 1
        self._changed({(to_folder, to_name): node}, None, None)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._enter("unlink", path, dir_fd)
        folder, name = self._locate(path, dir_fd)
        node = folder.names.get(name)
        if node is None:
            _fail(errno.ENOENT, path)
        if isinstance(node, _Folder):
            _fail(errno.EISDIR, path)
        del folder.names[name]
        self._changed({(folder, name): None}, None, None)
        node.links -= 1
        self._free_if_unused(node)

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._enter("mkdir", path, mode, dir_fd)
        folder, name = self._locate(path, dir_fd)
        node = _Folder(self._new_ino(), folder)
        if not name or folder.names.setdefault(name, node) is not node:
            _fail(errno.EEXIST, path)
        self._changed({(folder, name): node}, node, None)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        self._enter("rmdir", path, dir_fd)
        folder, name = self._locate(path, dir_fd)
        node = folder.names.get(name)
        if node is None:
            _fail(errno.ENOENT, path)
        if not isinstance(node, _Folder):
            _fail(errno.ENOTDIR, path)
        if node.names:
            _fail(errno.ENOTEMPTY, path)
        del folder.names[name]
        self._changed({(folder, name): None}, None, node)

    def listdir(self, fd: int, /) -> list[str]:
        self._enter("listdir", fd)
        node = self._description(fd).node
        if not isinstance(node, _Folder):
            _fail(errno.ENOTDIR, "")
        return list(node.names)

    def stat(self, path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        self._enter("stat", path, dir_fd)
        return self._status(self._find(path, dir_fd))

    def fstat(self, fd: int, /) -> os.stat_result:
        self._enter("fstat", fd)
        return self._status(self._description(fd).node)

    def _status(self, node: _Node) -> os.stat_result:
        if isinstance(node, _File):
            mode, size, space = stat.S_IFREG | 0o644, node.size, node.end
        else:
            mode, size, space = stat.S_IFDIR | 0o755, BLOCK_BYTES, BLOCK_BYTES
        fields = (mode, node.ino, self.device, node.links, 0, 0, size, 0, 0, 0)
        return os.stat_result(fields, {"st_blocks": space // 512})

    def fstatvfs(self, fd: int, /) -> os.statvfs_result:
        self._enter("fstatvfs", fd)
        self._description(fd)
        free = self._room_bytes() // BLOCK_BYTES
        total = self.capacity_bytes // BLOCK_BYTES
        return os.statvfs_result((BLOCK_BYTES, BLOCK_BYTES, total, free, free, 1 << 20, 1 << 20, 1 << 20, 0, 255))

    # FileSystem: locks

    def lock_exclusive(self, fd: int, /) -> None:
        self._enter("lock_exclusive", fd)
        description = self._description(fd)
        if self._locks.setdefault(_file_of(description), description) is not description:
            _fail(errno.EAGAIN, description.path)

    def is_locked(self, fd: int, /) -> bool:
        self._enter("is_locked", fd)
        description = self._description(fd)
        return self._locks.get(_file_of(description), description) is not description

    # inside

    def _enter(self, name: str, *args: Any) -> int | None:
        if self._dying is not None:
            raise self._dying
        self.counts[name] += 1
        hook = self.before_call
        if hook is None:
            return None
        try:
            return hook(name, args)
        except Crash:
            self._dying = Crash()
            raise

    def _changed(self, sets: dict[_Key, _Node | None], made: _Folder | None, removed: _Folder | None) -> None:
        if len(self._name_changes) >= NAME_CHANGES_MAX:
            self._name_changes.pop(0).apply()
        self._name_changes.append(_NameChange(sets, made, removed))

    def _sync(self, name: str, fd: int) -> None:
        try:
            self._enter(name, fd)
        except OSError:
            node = self._description(fd).node
            if isinstance(node, _File):
                node.lost = True
                node.settle(self.rng, sizes_kept=True)
            raise
        node = self._description(fd).node
        if self.lies:
            return
        if isinstance(node, _File):
            node.sync()
        else:
            self._sync_names(node)

    def _sync_names(self, folder: _Folder) -> None:
        """The changes in this folder, and the earlier ones about the same names, reach the disk in their order."""
        changes = self._name_changes
        wanted: list[_NameChange] = []
        others: list[_NameChange] = []
        keys: set[_Key] = set()
        folders = {folder}
        left = folder.unsynced
        elsewhere = False
        index = len(changes)
        while index and (left or elsewhere):
            index -= 1
            change = changes[index]
            if not folders.isdisjoint(change.folders) or (keys and not keys.isdisjoint(change.sets)):
                wanted.append(change)
                keys.update(change.sets)
                left -= folder in change.folders
                if change.removed is not None:
                    folders.add(change.removed)
                    elsewhere = True
                elif len(change.folders) > 1:
                    elsewhere = True
            else:
                others.append(change)
        for change in reversed(wanted):
            change.apply()
        others.reverse()
        changes[index:] = others

    def _cut_names(self, rng: random.Random) -> None:
        chance = rng.random()
        changes = self._name_changes
        if chance < 0.2:
            kept: list[_NameChange] = []
        elif chance < 0.4:
            kept = changes
        elif chance < 0.55:
            kept = changes[: rng.randrange(len(changes) + 1)]
        else:
            kept = _some_in_order(changes, rng)
        for change in kept:
            change.apply()
        for change in changes:
            for folder in change.folders:
                folder.unsynced = 0
        self._name_changes = []
        folders = [self._root]
        files: set[_File] = set()
        while folders:
            folder = folders.pop()
            folder.names = dict(folder.disk)
            for node in folder.names.values():
                if isinstance(node, _Folder):
                    folders.append(node)
                else:
                    if node not in files:
                        files.add(node)
                        node.links = node.openers = 0
                    node.links += 1

    def _files(self) -> list[_File]:
        """Every file that has a name now, once, in an order that depends on the calls alone."""
        folders = [self._root]
        files: dict[_File, None] = {}
        while folders:
            for node in folders.pop().names.values():
                if isinstance(node, _Folder):
                    folders.append(node)
                else:
                    files[node] = None
        return list(files)

    def _locate(self, path: str, dir_fd: int | None) -> tuple[_Folder, str]:
        """Folder and last part of the path; the part is "" for the folder itself."""
        node: _Node | None = self._root
        if dir_fd is not None and not path.startswith("/"):
            node = self._description(dir_fd).node
        *above, name = _parts(path) or [""]
        for part in above:
            if not isinstance(node, _Folder):
                _fail(errno.ENOTDIR, path)
            node = node.names.get(part)
            if node is None:
                _fail(errno.ENOENT, path)
        if not isinstance(node, _Folder):
            _fail(errno.ENOTDIR, path)
        return node, name

    def _find(self, path: str, dir_fd: int | None) -> _Node:
        folder, name = self._locate(path, dir_fd)
        node = folder.names.get(name) if name else folder
        if node is None:
            _fail(errno.ENOENT, path)
        return node

    def _open(self, node: _Node, path: str, flags: int) -> int:
        if isinstance(node, _Folder):
            if flags & (os.O_WRONLY | os.O_RDWR):
                _fail(errno.EISDIR, path)
        else:
            if flags & os.O_DIRECTORY == os.O_DIRECTORY:
                _fail(errno.ENOTDIR, path)
            if flags & os.O_DIRECT and not self.takes_direct:
                _fail(errno.EINVAL, path)
            node.openers += 1
        assert flags & os.O_CLOEXEC, "descriptors must not leak into child processes"
        self._next_fd += 1  # never used twice: a use after close is EBADF, not another file
        self._fds[self._next_fd] = _Open(node, path, flags)
        return self._next_fd

    def _description(self, fd: int) -> _Open:
        description = self._fds.get(fd)
        if description is None:
            _fail(errno.EBADF, str(fd))
        return description

    def _new_ino(self) -> int:
        self._next_ino += 1
        return self._next_ino

    def _room_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.taken_bytes)

    def _take_space(self, file: _File, end: int) -> None:
        end = _blocks(end)
        if end > file.end:
            self.taken_bytes += end - file.end
            file.end = end

    def _free_if_unused(self, file: _File) -> None:
        """Space is free once the file has no name and no opener. The content stays: a power cut may undo the unlink."""
        if not file.links and not file.openers:
            self.taken_bytes -= file.end


class Image(NamedTuple):
    """A file system's content at one moment."""

    root: _Folder


def _copy_of(folder: _Folder, parent: _Folder | None, copies: dict[_File, _File]) -> _Folder:
    """A durable copy of what is seen in a folder and below; a file with several names stays one."""
    copy = _Folder(folder.ino, parent)
    for name, node in folder.names.items():
        if isinstance(node, _Folder):
            copy.names[name] = _copy_of(node, copy, copies)
            continue
        if node not in copies:
            fresh = copies[node] = _File(node.ino)
            fresh.write(0, bytes(node.data), True)
            if node.size > len(node.data):
                fresh.resize(node.size)
                fresh.sync()
            fresh.end = node.end
            fresh.links = node.links
        copy.names[name] = copies[node]
    copy.disk = dict(copy.names)
    return copy


def _some_in_order(changes: Sequence[_NameChange], rng: random.Random) -> list[_NameChange]:
    """A random part of the changes that holds, with each of them, the earlier ones that it builds on."""
    share = rng.choice((0.3, 0.6, 0.9))
    kept: list[_NameChange] = []
    lost_keys: set[_Key] = set()
    lost_folders: set[_Folder] = set()
    changed_folders: set[_Folder] = set()
    for change in changes:
        if (
            rng.random() < share
            and lost_keys.isdisjoint(change.sets)
            and lost_folders.isdisjoint(change.folders)
            and change.removed not in changed_folders
        ):
            kept.append(change)
        else:
            lost_keys.update(change.sets)
            changed_folders.update(change.folders)
            if change.made is not None:
                lost_folders.add(change.made)
    return kept


def _some_of(
    disk: bytearray, disk_size: int, changes: Sequence[_Change], rng: random.Random, sizes_kept: bool
) -> tuple[bytearray, int]:
    """Content and size of a file after a power cut.

    A sector is written out as it stood at some moment, so it stops at one of the writes that touched it and holds all
    the earlier ones too. Size changes are kept up to one of them, in order.
    """
    mode = rng.choice(("none", "all", "writes", "torn", "torn"))
    forced = max(
        (index for index, change in enumerate(changes) if change[4] or (sizes_kept and change[0] == _SIZE)), default=-1
    )
    last_size = {"none": -1, "all": len(changes) - 1}.get(mode, rng.randrange(-1, len(changes)))
    last_size = max(last_size, forced)
    version: dict[int, int] = {}
    for index, (kind, offset, piece, _, durable) in enumerate(changes):
        if kind == _DATA:
            first = offset // SECTOR_BYTES
            count = -(-(offset + len(piece)) // SECTOR_BYTES) - first
            for sector in range(count) if durable else _sectors_kept(count, mode, rng):
                version[first + sector] = index
    content = bytearray(disk)
    size = disk_size
    for index, (kind, offset, piece, new_size, _) in enumerate(changes):
        if index <= last_size:
            size = new_size
            if kind == _SIZE:
                del content[new_size:]
        elif kind == _SIZE:
            for sector, last in version.items():
                if last > index:
                    low, high = max(new_size, sector * SECTOR_BYTES), (sector + 1) * SECTOR_BYTES
                    if low < high:
                        _put_bytes(content, low, bytes(high - low))
        if kind == _DATA:
            end = offset + len(piece)
            for sector in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                if version.get(sector, -1) >= index:
                    low = max(offset, sector * SECTOR_BYTES)
                    high = min(end, (sector + 1) * SECTOR_BYTES)
                    _put_bytes(content, low, piece[low - offset : high - offset])
    del content[size:]
    return content, size


def _sectors_kept(count: int, mode: str, rng: random.Random) -> Sequence[int]:
    """Which of the sectors of one write reach the disk."""
    everything = range(count)
    if mode in ("none", "all"):
        return everything if mode == "all" else ()
    chance = rng.random()
    if mode == "writes" or count == 1:
        return everything if chance < 0.5 else ()
    if chance < 0.25:
        return everything
    if chance < 0.45:
        return ()
    if chance < 0.65:
        return range(rng.randrange(count + 1))
    if chance < 0.8:
        return range(rng.randrange(count + 1), count)
    return [sector for sector in everything if rng.random() < 0.5]


def _put_bytes(target: bytearray, offset: int, piece: bytes) -> None:
    gap = offset - len(target)
    if gap > 0:
        target.extend(bytes(gap))
    target[offset : offset + len(piece)] = piece


@functools.lru_cache(maxsize=1 << 14)
def _parts(path: str) -> Sequence[str]:
    return [part for part in path.split("/") if part and part != "."]


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _file_of(description: _Open) -> _File:
    node = description.node
    if not isinstance(node, _File):
        _fail(errno.EISDIR, description.path)
    return node


def _fail(code: int, path: str) -> NoReturn:
    raise OSError(code, os.strerror(code), path)
