"""Places for the backend contract (tests/contract/backend_*contract.py): one storage, many backends over it."""

import errno
import os
import random
import threading
from collections.abc import Callable
from typing import Any, cast

from objstore.backend.base import Backend
from objstore.backend.directory import DirectoryBackend
from objstore.backend.filesystem import FileSystem
from objstore.backend.memory import MemoryBackend, MemoryStorage
from tests.support.fakefs import BLOCK_BYTES, Crash, FakeFileSystem

ZONE = "/zone"

MakeDirectory = Callable[[str, FileSystem], Backend]


class MemoryPlace:
    """One MemoryStorage."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()

    def open(self) -> Backend:
        return MemoryBackend(self._storage)


class RealPlace:
    """A directory of the host."""

    def __init__(self, path: str, recycle_files_max: int) -> None:
        self._path = path
        self._recycle_files_max = recycle_files_max
        self._opened: list[Backend] = []

    def open(self) -> Backend:
        backend = DirectoryBackend(self._path, recycle_files_max=self._recycle_files_max)
        self._opened.append(backend)
        return backend

    def close(self) -> None:
        for backend in self._opened:
            backend.close()


class OneAtATime:
    """A FileSystem whose calls wait for each other, for tests that use threads."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._fs, name)

        def locked(*args: Any, **options: Any) -> Any:
            with self._lock:
                return call(*args, **options)

        return locked


class FakePlace:
    """A directory of a FakeFileSystem, with every fault that this can play."""

    def __init__(self, make: MakeDirectory) -> None:
        self._make = make
        self.fs = FakeFileSystem(rng=random.Random(7))
        self.fs.make_folder(ZONE)
        self.fs.before_call = self._before_call
        self._one_at_a_time = OneAtATime(self.fs)
        self._calls_left: int | None = None
        self._syncs_failing = 0
        self._visit: tuple[int, Callable[[], None]] | None = None
        self._move_bytes_max: int | None = None

    def open(self) -> Backend:
        return self._make(ZONE, cast(FileSystem, self._one_at_a_time))

    def crash_at(self, calls: int | None) -> None:
        self._calls_left = calls

    def at_call(self, calls: int, action: Callable[[], None]) -> None:
        self._visit = calls, action

    def kill(self) -> None:
        self.fs.crash("kill")

    def cut_power(self, rng: random.Random) -> None:
        self.fs.crash("power", rng)

    def leave_free(self, free_bytes: int) -> None:
        self.fs.capacity_bytes = self.fs.taken_bytes + free_bytes

    def fail_syncs(self, count: int) -> None:
        self._syncs_failing = count

    def short_transfers(self, bytes_max: int | None) -> None:
        self._move_bytes_max = bytes_max

    def _before_call(self, name: str, args: tuple[Any, ...]) -> int | None:
        if self._calls_left is not None:
            if not self._calls_left:
                torn = BLOCK_BYTES + 100 if name == "pwritev" else 0
                raise Crash(torn)
            self._calls_left -= 1
        if self._visit is not None:
            calls, action = self._visit
            self._visit = (calls - 1, action) if calls else None
            if not calls:
                action()
        if self._syncs_failing and name in ("fsync", "fdatasync"):
            self._syncs_failing -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._move_bytes_max if name in ("preadv", "pwritev") else None


def directory(recycle_files_max: int = 0) -> MakeDirectory:
    """Makes sound directory backends."""
    return lambda path, fs: DirectoryBackend(path, fs=fs, recycle_files_max=recycle_files_max)
