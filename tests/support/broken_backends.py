"""Directory backends that each break one clause of the contract, and the test of the suite that must notice."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from objstore.backend.base import Backend, Entry, Handle
from objstore.backend.directory import DirectoryBackend, FileWriter
from objstore.backend.file_handle import FileHandle
from objstore.backend.filesystem import FileSystem
from objstore.errors import Exists, NotFound


@dataclass(frozen=True)
class Broken:
    """One broken backend. name: the clause it breaks; caught_by: the test of the contract that fails over it,
    called with args."""

    name: str
    caught_by: str
    make: Callable[[str, FileSystem], Backend]
    recycle_files_max: int = 0
    args: tuple[str, ...] = ()


class _Without:
    """A file system with some calls replaced."""

    def __init__(self, fs: FileSystem, **calls: Callable[..., Any]) -> None:
        self._fs = fs
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)


class PutInPlace(DirectoryBackend):
    def put(self, name: str, data: bytes) -> None:
        try:
            super().put_if_absent(name, data)
        except Exists:
            fd = self._fs.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._root)
            self._fs.ftruncate(fd, 0)
            self._fs.pwritev(fd, [memoryview(data)], 0)
            self._fs.fsync(fd)
            self._fs.close(fd)


class NameNotDurable(DirectoryBackend):
    def _sync_folder(self, folder: str) -> None:
        return None


class NewFolderNotDurable(DirectoryBackend):
    def _make_durable(self, folder: str) -> None:
        sync, self._sync_folder = self._sync_folder, lambda folder: None  # type: ignore[method-assign]
        super()._make_durable(folder)
        self._sync_folder = sync  # type: ignore[method-assign]


class FoundFolderTaken(DirectoryBackend):
    """Believes that a folder which is there is there to stay."""

    def _make_durable(self, folder: str) -> None:
        try:
            if self._fs.stat(folder or ".", dir_fd=self._root):
                return
        except FileNotFoundError:
            super()._make_durable(folder)


class FileNotSynced(DirectoryBackend):
    def put_stream(self, name: str) -> FileWriter:
        writer = super().put_stream(name)
        writer._finish = writer._close  # type: ignore[method-assign]
        return writer


class TwoWinners(DirectoryBackend):
    def put_if_absent(self, name: str, data: bytes) -> None:
        try:
            self.get(name)
        except NotFound:
            self.put(name, data)
        else:
            raise Exists(name)


class ReplaceRegardless(DirectoryBackend):
    def replace_if(self, name: str, expected: bytes, data: bytes) -> None:
        self.put(name, data)


class CreateReplaces(DirectoryBackend):
    def _link(self, source: str, name: str) -> None:
        self._rename(source, name)


class ListsUnfinished(DirectoryBackend):
    def list(self, prefix: str) -> list[Entry]:
        return sorted(
            Entry(name, status.st_size) for name, status in self._walk(prefix.rstrip("/"), hidden=frozenset())
        )


class PrefixIsText(DirectoryBackend):
    def list(self, prefix: str) -> list[Entry]:
        return [entry for entry in super().list("") if entry.name.startswith(prefix.removesuffix("/"))]


class CreateSparse(DirectoryBackend):
    def _allocate(self, fd: int, size_bytes: int) -> None:
        self._fs.ftruncate(fd, size_bytes)


class CreateUnsynced(DirectoryBackend):
    """Makes the object under its own name and lets its size follow."""

    def _create(self, name: str, size_bytes: int, reserve_bytes: int) -> Handle:
        with self._calls("create", name), self._folder_in_use(name.rpartition("/")[0]) as folder:
            fd = self._fs.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=self._root)
            self._sync_folder(folder)
            self._allocate(fd, size_bytes)
            self._fs.fsync(fd)
            return FileHandle(self._fs, self._able, self.path, name, fd, size_bytes)


class NoReserve(DirectoryBackend):
    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        return super().create(name, size_bytes)


class FailedCreateStays(DirectoryBackend):
    def _unlink_leftover(self, path: str) -> None:
        return None


class DeleteClosesReaders(DirectoryBackend):
    def delete(self, name: str) -> None:
        try:
            fd = self._fs.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._root)
        except FileNotFoundError:
            return
        self._fs.ftruncate(fd, 0)
        self._fs.close(fd)
        super().delete(name)


class LitterStays(DirectoryBackend):
    def _clean_up(self) -> None:
        return None


class RetiredNameNotDurable(DirectoryBackend):
    def retire(self, name: str) -> None:
        sync, self._sync_folder = self._sync_folder, lambda folder: None  # type: ignore[method-assign]
        super().retire(name)
        self._sync_folder = sync  # type: ignore[method-assign]


class RetiredWhileNamed(DirectoryBackend):
    """Gives a file to the pool and leaves it its old name."""

    def retire(self, name: str) -> None:
        rename = self._fs.link
        self._spares._fs = _Without(self._fs, rename=rename)  # type: ignore[assignment]
        super().retire(name)
        self._spares._fs = self._fs


class StaleReads(FileHandle):
    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        super().read(offset_bytes, buffers)
        return sum(buffer.nbytes for buffer in buffers)


class NowaitShort(FileHandle):
    def read_nowait(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self._preadv(self._fd, buffers, offset_bytes, os.RWF_NOWAIT)


class SyncsNothing(FileHandle):
    def sync(self) -> None:
        return None


class TruncatesLater(FileHandle):
    def truncate(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class DurableIsNot(FileHandle):
    def write_durable(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self.write(offset_bytes, buffers)


class GrowsWhenWritten(FileHandle):
    def _write_length(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return sum(buffer.nbytes for buffer in buffers)


class UncachedIsCached(FileHandle):
    def read_uncached(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self.read(offset_bytes, buffers)


class ShortWrites(FileHandle):
    def write(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        if buffers:
            self._pwritev(self._fd, buffers, offset_bytes)


def _backend(kind: type[DirectoryBackend], recycle_files_max: int = 0) -> Callable[[str, FileSystem], Backend]:
    return lambda path, fs: kind(path, fs=fs, recycle_files_max=recycle_files_max)


def _handle(kind: type[FileHandle]) -> Callable[[str, FileSystem], Backend]:
    """A sound backend whose handles are of that kind."""

    class WithHandles(DirectoryBackend):
        def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
            return self._changed(super().create(name, size_bytes, reserve_bytes=reserve_bytes))

        def open(self, name: str) -> Handle:
            return self._changed(super().open(name))

        def _changed(self, handle: Handle) -> Handle:
            assert isinstance(handle, FileHandle)
            return kind(handle._fs, handle._able, handle._zone, handle.name, handle._fd, handle.size_bytes)

    return _backend(WithHandles)


class RemovalNotDurable(DirectoryBackend):
    def _sync_if_there(self, folder: str) -> None:
        pass


def _calls(**calls: Callable[..., Any]) -> Callable[[str, FileSystem], Backend]:
    """A sound backend on a file system with some calls replaced."""
    return lambda path, fs: DirectoryBackend(path, fs=_Without(fs, **calls))  # type: ignore[arg-type]


BROKEN = [
    Broken("put is not atomic", "test_put_is_atomic", _backend(PutInPlace)),
    Broken("put does not sync the file", "test_what_returned_is_durable", _backend(FileNotSynced)),
    Broken("name not durable", "test_what_returned_is_durable", _backend(NameNotDurable)),
    Broken("new folder not durable", "test_what_returned_is_durable", _backend(NewFolderNotDurable)),
    Broken("found folder not durable", "test_what_was_found_is_durable_once_used", _backend(FoundFolderTaken)),
    Broken(
        "put_if_absent with two winners",
        "test_one_winner_whatever_the_step",
        _backend(TwoWinners),
        args=("put_if_absent",),
    ),
    Broken("replace_if ignores expected", "test_replace_if", _backend(ReplaceRegardless)),
    Broken("replace_if with two winners", "test_replace_if_has_one_winner", _backend(ReplaceRegardless)),
    Broken("create replaces", "test_create_refuses_a_taken_name", _backend(CreateReplaces)),
    Broken(
        "create replaces in a race", "test_one_winner_whatever_the_step", _backend(CreateReplaces), args=("create",)
    ),
    Broken("create shows a part", "test_create_is_atomic", _backend(CreateUnsynced)),
    Broken("create without space", "test_space_set_aside_stays_ours", _backend(CreateSparse)),
    Broken("create ignores the reserve", "test_create_keeps_the_reserve", _backend(NoReserve)),
    Broken("failed create keeps space", "test_create_refuses_a_taken_name", _backend(FailedCreateStays)),
    Broken("list shows unfinished puts", "test_stream_is_invisible_until_commit", _backend(ListsUnfinished)),
    Broken("list takes text for folders", "test_list_knows_folders", _backend(PrefixIsText)),
    Broken("read past the end is stale", "test_read_ends_with_the_object", _handle(StaleReads)),
    Broken("read_nowait is short", "test_short_transfers_are_continued", _handle(NowaitShort)),
    Broken("write past the size grows", "test_write_past_the_size_is_refused", _handle(GrowsWhenWritten)),
    Broken("short writes are not continued", "test_short_transfers_are_continued", _handle(ShortWrites)),
    Broken("sync does not", "test_synced_writes_are_durable", _handle(SyncsNothing), args=("write",)),
    Broken("write_durable is not", "test_write_durable_covers_its_own_bytes", _handle(DurableIsNot)),
    Broken("truncate keeps the space", "test_truncate", _handle(TruncatesLater)),
    Broken("read_uncached is cached", "test_uncached_reads_see_what_a_failed_sync_lost", _handle(UncachedIsCached)),
    Broken(
        "delete closes readers", "test_deleted_object_stays_readable_where_it_is_open", _backend(DeleteClosesReaders)
    ),
    Broken("removal is not durable", "test_delete_all_is_durable", _backend(RemovalNotDurable)),
    Broken("lock is not exclusive", "test_lock_is_exclusive", _calls(lock_exclusive=lambda fd: None)),
    Broken("lock note outlives its holder", "test_lock_is_exclusive", _calls(is_locked=lambda fd: True)),
    Broken("crashes leave litter", "test_crashes_leave_no_litter", _backend(LitterStays)),
    Broken(
        "retired name comes back",
        "test_a_new_life_of_a_file_does_not_show_under_its_old_name",
        _backend(RetiredNameNotDurable, 3),
        recycle_files_max=3,
    ),
    Broken("retired object keeps its name", "test_retired_objects_are_gone", _backend(RetiredWhileNamed, 3), 3),
]
