"""One open file of a directory zone: scatter-gather transfers, sync, and reads that never wait or go round the cache.

Threads: as the contract says, one call at a time, and `read_nowait` beside it. Nobody may be in a read while `close`
runs: the descriptor's number could by then belong to another file.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from errno import EAGAIN, EINVAL, EIO, ENOENT, EOPNOTSUPP
from typing import Final

from objstore.backend.base import Handle, ZoneFailed
from objstore.backend.filesystem import FileSystem
from objstore.backend.oserrors import FULL_ERRNOS, translated
from objstore.errors import InvalidRequest, StoreError

IOV_MAX: Final = 1024
"""Most buffers that Linux takes in one preadv or pwritev (UIO_MAXIOV)."""
DIRECT_ALIGN_BYTES: Final = 4096
"""Offset, length and address of an O_DIRECT read are multiples of this; no disk in use asks for more."""
BOUNCE_BYTES: Final = 1 << 20
"""Most bytes that one O_DIRECT read brings in; the memory that read_uncached takes while it runs."""

_NOWAIT: Final = os.RWF_NOWAIT
_DSYNC: Final = os.RWF_DSYNC


class ZoneAbilities:
    """What this zone's file system turned out to take; each goes to False at the first refusal and stays there."""

    __slots__ = ("direct", "dsync", "nowait")

    def __init__(self) -> None:
        self.nowait = True
        self.dsync = True
        self.direct = True


class FileHandle(Handle):
    """A Handle over a descriptor that it owns."""

    __slots__ = (
        "_able",
        "_broken",
        "_cached_only",
        "_direct_fd",
        "_fd",
        "_fs",
        "_nowait",
        "_preadv",
        "_pwritev",
        "_resized",
        "_writable",
        "_zone",
        "name",
        "recycled",
        "size_bytes",
    )

    def __init__(
        self,
        fs: FileSystem,
        able: ZoneAbilities,
        zone: str,
        name: str,
        fd: int,
        size_bytes: int,
        *,
        writable: bool = True,
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self._fs = fs
        self._preadv = fs.preadv
        self._pwritev = fs.pwritev
        self._able = able
        self._nowait = able.nowait
        self._zone = zone
        self._fd = fd
        self._direct_fd = -1
        self._resized = False
        self._cached_only = False
        self._writable = writable
        self._broken: str | None = None
        self.recycled = False

    # writing

    def write(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        want = self._write_length(offset_bytes, buffers)
        try:
            _write(self._pwritev, self._fd, buffers, offset_bytes, want, 0)
        except OSError as error:
            raise self._failed(error, "write", written_back=False) from error

    def write_soon(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self.write(offset_bytes, buffers)
        try:
            self._fs.start_writeback(self._fd, offset_bytes, _length(buffers))
        except OSError as error:
            raise self._failed(error, "write_soon") from error

    def write_around(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        want = self._write_length(offset_bytes, buffers)
        fd = -1 if (offset_bytes | want) & (DIRECT_ALIGN_BYTES - 1) else self._around()
        if fd >= 0:
            try:
                _write(self._pwritev, fd, buffers, offset_bytes, want, 0)
            except OSError as error:
                if error.errno not in (EINVAL, EOPNOTSUPP):
                    raise self._failed(error, "write_around", written_back=False) from error
                self._cached_only = True
            else:
                return
        self.write(offset_bytes, buffers)

    def write_durable(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        want = self._write_length(offset_bytes, buffers)
        if self._broken is not None:
            raise ZoneFailed(self._broken)
        try:
            if self._able.dsync and not self._resized:
                try:
                    _write(self._pwritev, self._fd, buffers, offset_bytes, want, _DSYNC)
                except OSError as error:
                    if error.errno != EOPNOTSUPP:
                        raise
                    self._able.dsync = False
                else:
                    return
            _write(self._pwritev, self._fd, buffers, offset_bytes, want, 0)
            self._sync()
        except OSError as error:
            # Without space these bytes are unknown, and no others: whoever writes them again makes their pages dirty.
            raise self._failed(error, "write_durable", written_back=error.errno not in FULL_ERRNOS) from error

    def open_around(self) -> None:
        if self._pwritev is os.pwritev:
            self._around()

    def begin_durable(self, offset_bytes: int, length_bytes: int, *, around: bool) -> int:
        # A file system that stands between us and the kernel must see every call.
        if self._pwritev is not os.pwritev or not self._able.dsync or self._resized or self._broken is not None:
            return -1
        if offset_bytes + length_bytes > self.size_bytes:
            return -1
        if not around:
            return self._fd
        return -1 if self._cached_only or (offset_bytes | length_bytes) % DIRECT_ALIGN_BYTES else self._direct_fd

    def end_durable(self, length_bytes: int, result: int) -> bool:
        if result < 0:
            if -result in (EINVAL, EOPNOTSUPP):
                self._cached_only = True
                return False
            error = OSError(-result, os.strerror(-result))
            raise self._failed(error, "write_durable", written_back=-result not in FULL_ERRNOS) from error
        return result == length_bytes

    def sync(self) -> None:
        if self._broken is not None:
            raise ZoneFailed(self._broken)
        try:
            self._sync()
        except OSError as error:
            raise self._failed(error, "sync") from error

    def truncate(self, size_bytes: int) -> None:
        if not 0 <= size_bytes <= self.size_bytes:
            raise InvalidRequest(f"truncate can't grow: size_bytes={size_bytes} of={self.size_bytes} name={self.name}")
        try:
            self._fs.ftruncate(self._fd, size_bytes)
        except OSError as error:
            raise self._failed(error, "truncate", written_back=False) from error
        self.size_bytes = size_bytes
        self._resized = True

    # reading

    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        try:
            return _move_all(self._preadv, self._fd, buffers, offset_bytes, _length(buffers), 0)
        except OSError as error:
            raise translated(error, self._zone, "read", self.name) from error

    def read_nowait(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        if not self._nowait or len(buffers) > IOV_MAX:
            return -1
        try:
            got = self._preadv(self._fd, buffers, offset_bytes, _NOWAIT)
        except OSError as error:
            number = error.errno
            if number == EAGAIN:
                return -1
            if number == EOPNOTSUPP:
                self._nowait = self._able.nowait = False
                return -1
            raise translated(error, self._zone, "read_nowait", self.name) from error
        # Short means the end of the object or a page that is not there; the blocking read knows which.
        return got if got == _length(buffers) else -1

    def read_uncached(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        try:
            if self._able.direct:
                try:
                    return self._read_direct(offset_bytes, buffers)
                except OSError as error:
                    if error.errno not in (EINVAL, EOPNOTSUPP, ENOENT):
                        raise
                    self._able.direct = False
            self._fs.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return _move_all(self._preadv, self._fd, buffers, offset_bytes, _length(buffers), 0)
        except OSError as error:
            raise translated(error, self._zone, "read_uncached", self.name) from error

    def close(self) -> None:
        open_fds = [fd for fd in (self._fd, self._direct_fd) if fd >= 0]
        self._fd = self._direct_fd = -1
        try:
            for fd in open_fds:
                self._fs.close(fd)
        except OSError as error:
            raise translated(error, self._zone, "close", self.name) from error

    # inside

    def _write_length(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        want = _length(buffers)
        if offset_bytes + want > self.size_bytes:
            raise InvalidRequest(
                f"write past the space set aside: offset_bytes={offset_bytes} length_bytes={want}"
                f" size_bytes={self.size_bytes} name={self.name} zone={self._zone}"
            )
        return want

    def _sync(self) -> None:
        # fdatasync has to bring a changed size to the disk only where reading the data needs it, and a smaller one
        # frees space without that.
        if self._resized:
            self._fs.fsync(self._fd)
            self._resized = False
        else:
            self._fs.fdatasync(self._fd)

    def _failed(self, error: OSError, call: str, *, written_back: bool = True) -> StoreError:
        """The contract's error for a failed write or sync. No later sync of this handle is believed then: after a
        failed write-back Linux has marked the pages clean and answers the next sync with success. Only a write that
        found no space has sent nothing to the device."""
        failure = translated(error, self._zone, call, self.name)
        if self._broken is None and (written_back or isinstance(failure, ZoneFailed)):
            self._broken = f"an earlier error stands: {failure}"
        return failure

    def _around(self) -> int:
        """A descriptor for writes around the page cache; -1: none is to be had, which is no fault of the zone."""
        if self._cached_only or not self._able.direct:
            return -1
        try:
            return self._direct()
        except OSError:
            self._cached_only = True
            return -1

    def _direct(self) -> int:
        """A descriptor of the file that goes around the page cache. OSError: the file system has none."""
        if self._direct_fd < 0:
            access = os.O_RDWR if self._writable else os.O_RDONLY
            self._direct_fd = self._fs.reopen(self._fd, access | os.O_CLOEXEC | os.O_DIRECT)
        return self._direct_fd

    def _read_direct(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        """Read around the page cache through an aligned buffer. Dirty pages are written to the device first."""
        direct_fd = self._direct()
        targets = [view for view in buffers if view.nbytes]
        want = sum(view.nbytes for view in targets)
        if len(targets) == 1 and not (offset_bytes | want) % DIRECT_ALIGN_BYTES:
            try:
                return _move_all(self._preadv, self._direct_fd, targets, offset_bytes, want, 0)
            except OSError as error:
                if error.errno != EINVAL:
                    raise  # else the memory is not aligned
        start = offset_bytes - offset_bytes % DIRECT_ALIGN_BYTES
        lead = offset_bytes - start
        span = -(-(lead + want) // DIRECT_ALIGN_BYTES) * DIRECT_ALIGN_BYTES
        if not want:
            return 0
        done = 0
        bounce = memoryview(mmap.mmap(-1, min(span, BOUNCE_BYTES)))
        while done < want:
            length = min(span, len(bounce))
            got = self._preadv(direct_fd, [bounce[:length]], start)
            fresh = bounce[lead : min(got, lead + want - done)]
            done += len(fresh)
            targets = _fill(targets, fresh)
            if not got or got % DIRECT_ALIGN_BYTES:
                break
            start += got
            span -= got
            lead = 0
        return done


def _fill(targets: list[memoryview], source: memoryview) -> list[memoryview]:
    """Copy source into the targets one behind the other; returns what is left of them."""
    at = 0
    while at < len(source):
        room = targets[0]
        length = min(room.nbytes, len(source) - at)
        room[:length] = source[at : at + length]
        at += length
        targets = _without(targets, length)
    return targets


def _without(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """The views less their first `done` bytes."""
    first = 0
    while first < len(views) and done >= views[first].nbytes:
        done -= views[first].nbytes
        first += 1
    rest = list(views[first:])
    if done:
        rest[0] = rest[0][done:]
    return rest


def _move_all(
    call: Callable[[int, Sequence[memoryview], int, int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset_bytes: int,
    want: int,
    flags: int,
) -> int:
    """preadv or pwritev until all `want` bytes of the buffers are moved or a call moves none (the end of the file);
    returns the bytes moved."""
    if not want:
        return 0
    done = call(fd, buffers if len(buffers) <= IOV_MAX else buffers[:IOV_MAX], offset_bytes, flags)
    moved = done
    while moved and done < want:
        rest = _without(buffers, done)
        moved = call(fd, rest[:IOV_MAX], offset_bytes + done, flags)
        done += moved
    return done


def _write(
    call: Callable[[int, Sequence[memoryview], int, int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset_bytes: int,
    want: int,
    flags: int,
) -> None:
    if _move_all(call, fd, buffers, offset_bytes, want, flags) != want:
        raise OSError(EIO, "the file system took only a part of the bytes and named no error")


def _length(buffers: Sequence[memoryview]) -> int:
    want = 0
    for buffer in buffers:
        want += buffer.nbytes
    return want


def write_all(fs: FileSystem, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
    """Write all the buffers to `fd` at offset_bytes, however many calls it takes; returns their bytes. OSError."""
    want = _length(buffers)
    _write(fs.pwritev, fd, buffers, offset_bytes, want, 0)
    return want


def read_all(fs: FileSystem, fd: int, length_bytes: int) -> bytes:
    """The first length_bytes of the file behind `fd`, fewer if it ends before. OSError."""
    data = bytearray(length_bytes)
    return bytes(data[: _move_all(fs.preadv, fd, [memoryview(data)], 0, length_bytes, 0)])
