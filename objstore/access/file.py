"""An open VDI as a file object: for everything that reads and writes files."""

import errno
import io
import os
from typing import Final, Protocol

from objstore import errors
from objstore.access.buffers import Buffer, readable, writable

_ERRNO: Final[dict[type[errors.StoreError], int]] = {
    errors.InvalidRequest: errno.EINVAL,
    errors.ReadOnly: errno.EROFS,
    errors.NoSpace: errno.ENOSPC,
}
"""Every other StoreError is EIO."""


def _as_os_error(error: errors.StoreError) -> OSError:
    number = next((_ERRNO[kind] for kind in type(error).__mro__ if kind in _ERRNO), errno.EIO)
    return OSError(number, str(error))


class BlockingAccess(Protocol):
    """What a file needs of an open VDI: the methods of blocking.BlockingVdi."""

    name: str
    size_bytes: int
    read_only: bool

    @property
    def closed(self) -> bool: ...
    def readinto(self, offset_bytes: int, buffer: Buffer) -> int: ...
    def write(self, offset_bytes: int, data: Buffer) -> int: ...
    def flush(self) -> None: ...


class VdiFile(io.RawIOBase):
    """A VDI opened by the blocking library, from its first byte to its last; its length is fixed.

    Errors of the store are OSErrors here, with the StoreError as their cause. A write at the end is ENOSPC; one across
    it writes what fits. `flush` makes durable, and so does `close`, which does not close the VDI.
    """

    def __init__(self, vdi: BlockingAccess) -> None:
        super().__init__()
        self._vdi = vdi
        self._position = 0
        self.name = vdi.name

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """Whether the VDI was opened for writing."""
        return not self._vdi.read_only

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of every file; positions behind the end are possible, reading there gives nothing."""
        self._check_open()
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._vdi.size_bytes}
        if whence not in starts or starts[whence] + offset < 0:
            raise OSError(errno.EINVAL, f"seek to {offset} from {whence}")
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill the buffer as far as the VDI goes; 0 at its end."""
        self._check_open()
        view = writable(buffer)
        view = view[: max(0, self._vdi.size_bytes - self._position)]
        if not len(view):
            return 0
        try:
            self._vdi.readinto(self._position, view)
        except errors.StoreError as error:
            raise _as_os_error(error) from error
        self._position += len(view)
        return len(view)

    def write(self, data: Buffer, /) -> int:
        """Write as much as there is room for; returns how much that was."""
        self._check_open()
        whole = readable(data)
        view = whole[: max(0, self._vdi.size_bytes - self._position)]
        if not len(view):
            if not len(whole):
                return 0
            raise OSError(errno.ENOSPC, f"the end of VDI {self.name!r}")
        try:
            self._vdi.write(self._position, view)
        except errors.StoreError as error:
            raise _as_os_error(error) from error
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Refused, unless the size is what it is."""
        self._check_open()
        wanted = self._position if size is None else size
        if wanted != self._vdi.size_bytes:
            raise OSError(errno.EINVAL, f"VDI {self.name!r} keeps its {self._vdi.size_bytes} bytes")
        return wanted

    def flush(self) -> None:
        """Make durable what was written."""
        if self.closed or self._vdi.closed or self._vdi.read_only:
            return
        try:
            self._vdi.flush()
        except errors.StoreError as error:
            raise _as_os_error(error) from error

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
