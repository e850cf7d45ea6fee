"""Space that a directory zone keeps back in a file of its own, for the moment when its file system is full.

Why: what the store leaves free of clients' data other programs may take, to the last byte; then nothing could be
recorded any more, not even a start or a deletion. The file is given up before that is told to anybody, and made again
when there is room.
"""

import contextlib
import os
import threading
from typing import Final

from objstore.backend.filesystem import FileSystem

BALLAST_NAME: Final = "ballast"
ROOM_TIMES: Final = 1.25
"""It is made where so many times its size are free."""

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Ballast:
    """The file `path` below `root_fd`, of size_bytes; 0: there is none. Raises OSError. Any thread may call."""

    def __init__(self, fs: FileSystem, root_fd: int, path: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._fs = fs
        self._root = root_fd
        self._path = path
        self._lock = threading.Lock()
        self.is_there = False
        """As far as this process knows."""

    @property
    def held_bytes(self) -> int:
        """What `drop` would give free."""
        return self.size_bytes if self.is_there else 0

    def adopt(self) -> None:
        """Take over what an earlier process left: a whole one counts, anything else goes."""
        with self._lock:
            try:
                status = self._fs.stat(self._path, dir_fd=self._root, follow_symlinks=False)
            except FileNotFoundError:
                return
            self.is_there = status.st_size == self.size_bytes > 0
            if not self.is_there:
                self._fs.unlink(self._path, dir_fd=self._root)

    def make(self, tmp: str, free_bytes: int) -> None:
        """Make it again if it is missing and there is room: under the name `tmp` first, so that it is whole or not
        there. Where that fails there is none."""
        with self._lock:
            if self.is_there or free_bytes < ROOM_TIMES * self.size_bytes or not self.size_bytes:
                return
            try:
                fd = self._fs.open(tmp, _NEW, 0o600, dir_fd=self._root)
                try:
                    self._fs.posix_fallocate(fd, 0, self.size_bytes)
                finally:
                    self._fs.close(fd)
                self._fs.rename(tmp, self._path, src_dir_fd=self._root, dst_dir_fd=self._root)
            except OSError:  # no room after all, or a file system that can't
                with contextlib.suppress(OSError):
                    self._fs.unlink(tmp, dir_fd=self._root)
                return
            self.is_there = True

    def drop(self) -> bool:
        """Give the space free; whether there was any."""
        with self._lock:
            if not self.is_there:
                return False
            self.is_there = False
            self._fs.unlink(self._path, dir_fd=self._root)
            return True
