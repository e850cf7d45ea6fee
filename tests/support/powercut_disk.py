"""What a file system holds in memory and what of it would survive a power cut, without any I/O.

Model, harsher than any one file system but allowed by POSIX:
- Bytes and the size of a file survive from its last fsync or fdatasync; an O_DSYNC write makes the pages that it
  touched and the size durable. A new file's name is not durable by that: names (create, link, rename, unlink, mkdir)
  survive from the last fsync of their directory. A rename between two directories is one step until one is synced.
- At a cut, what was not synced is dropped (`Cut.DROP`), or a seeded random part of it is kept, in any order
  (`Cut.TORN`): each page whole, not at all or torn by 512-byte sectors, each size old, new or between, and of the
  changes to one name the first few. Lost bytes inside a surviving size read as zeros or as the last sync left them.
"""

import enum
import errno
import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

PAGE_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
ZERO_PAGE: Final = bytes(PAGE_BYTES)


class Cut(enum.Enum):
    """What becomes of unsynced state."""

    DROP = "drop"
    TORN = "torn"


def failure(number: int) -> OSError:
    """The error that a system call would end with."""
    return OSError(number, os.strerror(number))


@dataclass(slots=True, eq=False)
class Inode:
    """A file or a directory. Processes see `pages` and `entries`; `undo` and `durable` lead back to the last sync."""

    number: int
    mode: int
    parent: "Inode | None" = None
    name: bytes = b""
    links: int = 0
    opens: int = 0
    mtime_ns: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)
    size_bytes: int = 0
    undo: dict[int, bytes | None] = field(default_factory=dict)
    durable_size_bytes: int = 0
    entries: dict[bytes, "Inode"] = field(default_factory=dict)
    durable: dict[bytes, "Inode"] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def path(self) -> str:
        """One path of the inode, from the root, for fault rules and messages."""
        parts = []
        node: Inode | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name.decode(errors="replace"))
            node = node.parent
        return "/".join(reversed(parts))


@dataclass(slots=True)
class NameChange:
    """One step in the name space: each side says what a name in a directory now stands for (None: nothing)."""

    sides: list[tuple[Inode, bytes, Inode | None]]


@dataclass(slots=True)
class CutReport:
    """What a cut met: unsynced pages and name changes, and how many of them it dropped or tore."""

    pages_unsynced: int = 0
    pages_lost: int = 0
    pages_torn: int = 0
    names_unsynced: int = 0
    names_lost: int = 0
    sizes_lost: int = 0


class Disk:
    """The whole file system; every method is one atomic operation.

    limit_bytes: space for data; allocation beyond it is ENOSPC.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._next_number = 1
        self.root = self._new(stat.S_IFDIR | 0o700)
        self.root.links = 1
        self._pending: list[NameChange] = []

    # Names

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        node = directory.entries.get(name)
        if node is None:
            raise failure(errno.ENOENT)
        return node

    def create(self, directory: Inode, name: bytes, mode: int, now_ns: int) -> Inode:
        """A new file or directory, as `mode` says; EEXIST if the name is taken."""
        if name in directory.entries:
            raise failure(errno.EEXIST)
        if directory.links == 0:
            raise failure(errno.ENOENT)
        node = self._new(mode)
        node.mtime_ns = now_ns
        self._change([(directory, name, node)])
        return node

    def link(self, node: Inode, directory: Inode, name: bytes) -> None:
        if node.is_directory:
            raise failure(errno.EPERM)
        if name in directory.entries:
            raise failure(errno.EEXIST)
        self._change([(directory, name, node)])

    def unlink(self, directory: Inode, name: bytes, *, of_directory: bool) -> None:
        node = self.lookup(directory, name)
        self._may_go(node, of_directory)
        self._change([(directory, name, None)])

    def rename(self, source: Inode, old: bytes, target: Inode, new: bytes, *, replace: bool) -> None:
        node = self.lookup(source, old)
        former = target.entries.get(new)
        if former is node:
            return
        if former is not None:
            if not replace:
                raise failure(errno.EEXIST)
            self._may_go(former, node.is_directory)
        above: Inode | None = target
        while above is not None:
            if above is node:
                raise failure(errno.EINVAL)
            above = above.parent
        self._change([(target, new, node), (source, old, None)])

    def sync_directory(self, directory: Inode) -> None:
        """fsync of a directory: its names, as they are, survive a cut."""
        for change in self._pending:
            change.sides = [side for side in change.sides if side[0] is not directory]
        self._pending = [change for change in self._pending if change.sides]
        directory.durable = dict(directory.entries)

    # Contents

    def read(self, node: Inode, offset_bytes: int, length_bytes: int) -> bytes:
        end = min(offset_bytes + length_bytes, node.size_bytes)
        if offset_bytes >= end:
            return b""
        first, last = offset_bytes // PAGE_BYTES, (end - 1) // PAGE_BYTES
        pages = node.pages
        whole = b"".join([pages.get(index, ZERO_PAGE) for index in range(first, last + 1)])
        skip = offset_bytes - first * PAGE_BYTES
        return whole[skip : skip + end - offset_bytes]

    def write(self, node: Inode, offset_bytes: int, data: memoryview | bytes, now_ns: int, *, durable: bool) -> None:
        """pwrite; `durable` as with O_DSYNC: these bytes and the size that they need, nothing else.

        ENOSPC: nothing written.
        """
        end = offset_bytes + len(data)
        if not end > offset_bytes:
            return
        view = memoryview(data)
        pages, undo = node.pages, node.undo
        indices = range(offset_bytes // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        self._allocate(sum(index not in pages for index in indices))
        for index in indices:
            start = index * PAGE_BYTES
            former = pages.get(index)
            if index not in undo:
                undo[index] = former
            if start >= offset_bytes and start + PAGE_BYTES <= end:
                pages[index] = bytes(view[start - offset_bytes : start - offset_bytes + PAGE_BYTES])
            else:
                page = bytearray(former or ZERO_PAGE)
                low, high = max(start, offset_bytes), min(start + PAGE_BYTES, end)
                page[low - start : high - start] = view[low - offset_bytes : high - offset_bytes]
                pages[index] = bytes(page)
        node.size_bytes = max(node.size_bytes, end)
        node.mtime_ns = now_ns
        if durable:
            for index in indices:
                undo.pop(index, None)
            node.durable_size_bytes = max(node.durable_size_bytes, end)

    def allocate(self, node: Inode, offset_bytes: int, length_bytes: int, *, keep_size: bool) -> None:
        """fallocate: pages set aside, zeros where there was nothing. ENOSPC: nothing done."""
        end = offset_bytes + length_bytes
        missing = [i for i in range(offset_bytes // PAGE_BYTES, -(-end // PAGE_BYTES)) if i not in node.pages]
        self._allocate(len(missing))
        for index in missing:
            node.undo.setdefault(index, None)
            node.pages[index] = ZERO_PAGE
        if not keep_size:
            node.size_bytes = max(node.size_bytes, end)

    def punch(self, node: Inode, offset_bytes: int, length_bytes: int, now_ns: int) -> None:
        """fallocate with FALLOC_FL_PUNCH_HOLE: zeros, whole pages given back."""
        end = min(offset_bytes + length_bytes, node.size_bytes)
        first, last = -(-offset_bytes // PAGE_BYTES), end // PAGE_BYTES
        if first > last:
            self._zero(node, offset_bytes, end, now_ns)
            return
        self._zero(node, offset_bytes, first * PAGE_BYTES, now_ns)
        self._zero(node, last * PAGE_BYTES, end, now_ns)
        self._free(node, [index for index in node.pages if first <= index < last])

    def truncate(self, node: Inode, size_bytes: int, now_ns: int) -> None:
        if size_bytes < node.size_bytes:
            self._zero(node, size_bytes, min(node.size_bytes, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES), now_ns)
            self._free(node, [index for index in node.pages if index * PAGE_BYTES >= size_bytes])
        node.size_bytes = size_bytes
        node.mtime_ns = now_ns

    def sync_file(self, node: Inode) -> None:
        """fsync or fdatasync: bytes and size survive a cut."""
        node.undo.clear()
        node.durable_size_bytes = node.size_bytes

    def opened(self, node: Inode) -> None:
        node.opens += 1

    def closed(self, node: Inode) -> None:
        node.opens -= 1
        self._give_back_if_gone(node)

    # The cut

    def cut(self, how: Cut, rng: random.Random) -> CutReport:
        """The power fails: afterwards only what survived is there, and it is durable. Every open file is closed."""
        report = CutReport(names_unsynced=len(self._pending))
        before = {id(node): node for node in self._walk(of_durable=False)}
        for component in self._name_components():
            kept = rng.randint(0, len(component)) if how is Cut.TORN else 0
            report.names_lost += len(component) - kept
            for change in component[:kept]:
                for directory, name, node in change.sides:
                    _set(directory.durable, name, node)
        self._pending = []
        survivors = list(self._walk(of_durable=True))
        for node in {**before, **{id(node): node for node in survivors}}.values():
            node.links = 0
            node.opens = 0
        self.root.links = 1
        self.used_bytes = 0
        for node in survivors:
            node.entries = dict(node.durable)
            for name, child in node.entries.items():
                child.links += 1
                child.parent, child.name = node, name
            if not node.is_directory:
                _cut_file(node, how, rng, report)
                self.used_bytes += len(node.pages) * PAGE_BYTES
        return report

    def _name_components(self) -> list[list[NameChange]]:
        """Pending changes in groups that share no name; inside a group in the order in which they were made."""
        group_of: dict[tuple[int, bytes], list[int]] = {}
        for index, change in enumerate(self._pending):
            keys = [(directory.number, name) for directory, name, _ in change.sides]
            touched = {id(group): group for key in keys if (group := group_of.get(key))}
            merged = sorted(member for group in touched.values() for member in group)
            for member in merged:
                keys.extend((directory.number, name) for directory, name, _ in self._pending[member].sides)
            merged.append(index)
            group_of.update(dict.fromkeys(keys, merged))
        groups = {id(group): group for group in group_of.values()}
        return [[self._pending[index] for index in group] for group in groups.values()]

    # Inside

    def _new(self, mode: int) -> Inode:
        node = Inode(self._next_number, mode)
        self._next_number += 1
        return node

    def _change(self, sides: list[tuple[Inode, bytes, Inode | None]]) -> None:
        replaced = [directory.entries.get(name) for directory, name, _ in sides]
        for directory, name, node in sides:
            _set(directory.entries, name, node)
            if node is not None:
                node.links += 1
                node.parent, node.name = directory, name
        for node in replaced:
            if node is not None:
                node.links -= 1
                self._give_back_if_gone(node)
        self._pending.append(NameChange(sides))

    @staticmethod
    def _may_go(node: Inode, of_directory: bool) -> None:
        if of_directory and not node.is_directory:
            raise failure(errno.ENOTDIR)
        if not of_directory and node.is_directory:
            raise failure(errno.EISDIR)
        if node.entries:
            raise failure(errno.ENOTEMPTY)

    def _allocate(self, page_count: int) -> None:
        if self.used_bytes + page_count * PAGE_BYTES > self.limit_bytes and page_count:
            raise failure(errno.ENOSPC)
        self.used_bytes += page_count * PAGE_BYTES

    def _free(self, node: Inode, indices: list[int]) -> None:
        for index in indices:
            node.undo.setdefault(index, node.pages.pop(index))
        self.used_bytes -= len(indices) * PAGE_BYTES

    def _zero(self, node: Inode, start: int, end: int, now_ns: int) -> None:
        if start < end and start // PAGE_BYTES in node.pages:
            self.write(node, start, bytes(end - start), now_ns, durable=False)

    def _give_back_if_gone(self, node: Inode) -> None:
        if node.links == 0 and node.opens == 0 and not node.is_directory:
            # The bytes stay with the inode: a cut before the directory is synced brings the name back.
            self.used_bytes -= len(node.pages) * PAGE_BYTES

    def _walk(self, *, of_durable: bool) -> Iterator[Inode]:
        seen = {id(self.root)}
        todo = [self.root]
        while todo:
            node = todo.pop()
            yield node
            for child in (node.durable if of_durable else node.entries).values():
                if id(child) not in seen:
                    seen.add(id(child))
                    todo.append(child)


def _set(names: dict[bytes, Inode], name: bytes, node: Inode | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _cut_file(node: Inode, how: Cut, rng: random.Random, report: CutReport) -> None:
    """Leave of an inode's unsynced bytes and size what survives."""
    report.pages_unsynced += len(node.undo)
    live_size, size = node.size_bytes, node.durable_size_bytes
    keep_share = 0.0
    if how is Cut.TORN and (node.undo or live_size != size):
        keep_share = rng.choice((0.0, 0.5, 0.9, 1.0))
        size = rng.choice((size, live_size, live_size, rng.randint(min(size, live_size), max(size, live_size))))
    report.sizes_lost += size != live_size
    for index, old in node.undo.items():
        # A page behind the live size was cut off by an unsynced truncate: it is gone with the size or back as it was.
        if index * PAGE_BYTES < live_size and rng.random() < keep_share:
            continue
        new = node.pages.get(index)
        if index * PAGE_BYTES < live_size and keep_share and rng.random() < 0.3:
            old = _torn(old, new, rng)
            report.pages_torn += 1
        else:
            report.pages_lost += 1
        if old is None:
            node.pages.pop(index, None)
        else:
            node.pages[index] = old
    for index in [index for index in node.pages if index * PAGE_BYTES >= size]:
        del node.pages[index]
    tail = size % PAGE_BYTES
    if tail and size // PAGE_BYTES in node.pages:
        node.pages[size // PAGE_BYTES] = node.pages[size // PAGE_BYTES][:tail] + ZERO_PAGE[tail:]
    node.size_bytes = node.durable_size_bytes = size
    node.undo = {}


def _torn(old: bytes | None, new: bytes | None, rng: random.Random) -> bytes:
    old, new = old or ZERO_PAGE, new or ZERO_PAGE
    return b"".join(
        (old if rng.getrandbits(1) else new)[start : start + SECTOR_BYTES]
        for start in range(0, PAGE_BYTES, SECTOR_BYTES)
    )
