"""The system calls that `DirectoryBackend` makes, as a protocol that a simulated file system can stand in for.

Each method is the `os` function of its name with the same arguments, errors (`OSError`) and short transfers, so the
real one adds no Python frame to a call. Paths are relative to `dir_fd`: a zone stays the directory that was opened,
also when something else is mounted over its path later.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final, Protocol

_FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock of fcntl(2): type, whence, start, length, pid."""
_SYNC_FILE_RANGE: Final = ctypes.CDLL(None, use_errno=True).sync_file_range
_SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE: Final = 2
_WHOLE_FILE: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class FileSystem(Protocol):
    """Everything the directory backend asks of the operating system."""

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int: ...

    def reopen(self, fd: int, flags: int, /) -> int:
        """A second, independent description of the file behind `fd`, also when that has no name any more."""
        ...

    def close(self, fd: int, /) -> None: ...

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int: ...

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int: ...

    def start_writeback(self, fd: int, offset: int, length: int, /) -> None:
        """sync_file_range(2) with SYNC_FILE_RANGE_WRITE: begin to write that range out; promises nothing."""
        ...

    def fdatasync(self, fd: int, /) -> None: ...

    def fsync(self, fd: int, /) -> None: ...

    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None: ...

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int, /) -> None: ...

    def ftruncate(self, fd: int, length: int, /) -> None: ...

    def rename(self, src: str, dst: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None: ...

    def link(self, src: str, dst: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None: ...

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None: ...

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None: ...

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None: ...

    def listdir(self, fd: int, /) -> list[str]: ...

    def stat(self, path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result: ...

    def fstat(self, fd: int, /) -> os.stat_result: ...

    def fstatvfs(self, fd: int, /) -> os.statvfs_result: ...

    def lock_exclusive(self, fd: int, /) -> None:
        """Take the exclusive lock of the file for this open description; BlockingIOError if another one has it."""
        ...

    def is_locked(self, fd: int, /) -> bool:
        """Whether another open description has the lock. Takes nothing, so it never stands in a taker's way."""
        ...


class OsFileSystem:
    """The operating system itself. Linux only: OFD locks, RWF_ flags, /proc/self/fd."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    fdatasync = staticmethod(os.fdatasync)
    fsync = staticmethod(os.fsync)
    posix_fallocate = staticmethod(os.posix_fallocate)
    posix_fadvise = staticmethod(os.posix_fadvise)
    ftruncate = staticmethod(os.ftruncate)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)
    stat = staticmethod(os.stat)
    fstat = staticmethod(os.fstat)
    fstatvfs = staticmethod(os.fstatvfs)

    @staticmethod
    def start_writeback(fd: int, offset: int, length: int, /) -> None:
        if _SYNC_FILE_RANGE(fd, offset, length, _SYNC_FILE_RANGE_WRITE):
            number = ctypes.get_errno()
            # File systems and sandboxes without it lose nothing: the sync that follows does all of the work.
            if number not in (errno.ESPIPE, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
                raise OSError(number, os.strerror(number))

    @staticmethod
    def listdir(fd: int, /) -> list[str]:
        return os.listdir(fd)

    @staticmethod
    def reopen(fd: int, flags: int, /) -> int:
        return os.open(f"/proc/self/fd/{fd}", flags)

    # OFD locks and not flock: only they can be asked about without being taken, and a status command that took the lock
    # for an instant would make a server that starts at that moment fail.
    @staticmethod
    def lock_exclusive(fd: int, /) -> None:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except PermissionError as error:  # POSIX lets a held lock be reported as EACCES too
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error

    @staticmethod
    def is_locked(fd: int, /) -> bool:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


OS_FILE_SYSTEM: Final[FileSystem] = OsFileSystem()
