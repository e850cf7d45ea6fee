"""The pool of retired files of a directory zone, which `create` uses again instead of allocating new ones.

Why: writing over allocated blocks needs no allocation and no conversion of unwritten extents; measured on one virtual
disk 1.1 GB/s against 0.34 for fallocated files. What makes it safe is that a file enters the pool only when nobody
reads it and its old name is durably gone, and that a file with a second name never leaves it.
Spares are named SIZE-N; N only tells them apart.
"""

import itertools
import os
import re
import threading
from collections.abc import Iterable
from typing import Final

from objstore.backend.filesystem import FileSystem

SPARE_FOLDER: Final = "spare"
SIZES_MAX: Final = 4
"""Most sizes of files that are worth keeping: the last different ones that `create` asked for."""

_NAME: Final = re.compile(r"([1-9][0-9]{0,18})-([0-9]{1,18})")


class SparePool:
    """At most files_max files below `spare/` of the directory `root_fd`. Raises OSError. Any thread may call."""

    def __init__(self, fs: FileSystem, root_fd: int, files_max: int) -> None:
        self.files_max = files_max
        self._fs = fs
        self._root = root_fd
        self._lock = threading.Lock()
        self._paths: list[str] = []
        self._numbers = itertools.count()
        self._wanted_bytes: list[int] = []

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of the files in the pool."""
        with self._lock:
            return sum(_size_of(path) for path in self._paths)

    def adopt(self, names: Iterable[str]) -> None:
        """Take over what an earlier process left in the folder, less what is not a whole spare or is too much.

        A spare with a second name is one that `create` was giving out when the power failed: an object owns it.
        """
        with self._lock:
            self._paths.clear()
            last_number = -1
            for name in sorted(names):
                path = f"{SPARE_FOLDER}/{name}"
                match = _NAME.fullmatch(name)
                status = self._fs.stat(path, dir_fd=self._root, follow_symlinks=False)
                whole = match is not None and status.st_size == int(match[1]) and status.st_nlink == 1
                if whole and len(self._paths) < self.files_max:
                    self._paths.append(path)
                    last_number = max(last_number, int(name.partition("-")[2]))
                else:
                    self._fs.unlink(path, dir_fd=self._root)
            self._numbers = itertools.count(last_number + 1)

    def give_out(self, size_bytes: int) -> str | None:
        """Path of a spare of exactly that size, no longer in the pool; None if there is none."""
        with self._lock:
            if size_bytes in self._wanted_bytes:
                self._wanted_bytes.remove(size_bytes)
            self._wanted_bytes.append(size_bytes)
            del self._wanted_bytes[:-SIZES_MAX]
            for index, path in enumerate(self._paths):
                if _size_of(path) == size_bytes:
                    return self._paths.pop(index)
            return None

    def take_from(self, name: str, size_bytes: int) -> str | None:
        """Move the file `name` into the folder if it has one of the sizes that `create` asked for last and there is
        room; a spare of a size that nobody wants makes room. Returns its path for put_in, None if it is not wanted.
        """
        with self._lock:
            if size_bytes not in self._wanted_bytes:
                return None
            if len(self._paths) >= self.files_max:
                useless = [path for path in self._paths if _size_of(path) not in self._wanted_bytes]
                if not useless:
                    return None
                self._remove(useless[0])
            path = f"{SPARE_FOLDER}/{size_bytes}-{next(self._numbers)}"
            self._fs.rename(name, path, src_dir_fd=self._root, dst_dir_fd=self._root)
            return path

    def put_in(self, path: str) -> None:
        """A file in the folder (from take_from, or from give_out and not used) may be given out from now on."""
        with self._lock:
            self._paths.append(path)
            if len(self._paths) > self.files_max:
                self._remove(path)

    def drop_all(self) -> bool:
        """Unlink every spare; whether there was one."""
        with self._lock:
            found = bool(self._paths)
            while self._paths:
                self._remove(self._paths[-1])
            return found

    def _remove(self, path: str) -> None:
        self._paths.remove(path)
        self._fs.unlink(path, dir_fd=self._root)


def _size_of(path: str) -> int:
    return int(os.path.basename(path).partition("-")[0])
