"""Every error objstore raises on purpose.

    StoreError            message ends in key=value pairs
      InvalidRequest      caller's mistake, do not repeat
        OutOfRange        past the end of the VDI; nothing done
      NotFound            no such VDI, snapshot or object
      Exists              the name is taken
      Busy                another process or client holds it
      Suspended           the VDI was changed under its clients; nobody may open it until it is resumed
      ReadOnly            a snapshot, or opened read-only; nothing done
      NoSpace             the zones are full; nothing done
      NotSupported        the request can't be done the cheap way that was asked for (FAST_ZERO)
      Unavailable         zones are missing or failed; may work later
      Corrupt             every copy is damaged; carries the damaged ranges
      Fenced              a later owner has this VDI; the handle stays dead
      Stopping            the store is closing
      FormatError         bytes of a zone are not what FORMAT.md says
        NewerFormat       they are of a newer format than this program knows

`nbdserver.dispatch` turns them into NBD error values in one place.
"""

from collections.abc import Sequence


class StoreError(Exception):
    """Base of every error that objstore raises on purpose."""


class InvalidRequest(StoreError):
    """The caller's mistake; repeating it can't help."""


class OutOfRange(InvalidRequest):
    """The range passes the end of the VDI; nothing was done."""


class NotFound(StoreError):
    """No such VDI, snapshot or object."""


class Exists(StoreError):
    """The name is taken."""


class Busy(StoreError):
    """Another process or client holds it."""


class Suspended(StoreError):
    """The VDI was changed under its clients, whose caches are older than it is: nobody may open it until `resume`.
    Or it is half of what is imported."""


class ReadOnly(StoreError):
    """The volume can't be written; nothing was done."""


class NoSpace(StoreError):
    """The zones are full; nothing was done."""


class NotSupported(StoreError):
    """The request would need the slow way that its caller excluded; nothing was done."""


class Unavailable(StoreError):
    """Zones are missing or failed; the request may work later."""


class Corrupt(StoreError):
    """Every copy of some blocks is damaged.

    bad: the damaged ranges of the request, (offset_bytes, length_bytes) in the VDI, ascending, not touching.
    A read that raises this has filled every other byte of its buffer.
    """

    def __init__(self, message: str, bad: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


class Fenced(StoreError):
    """A later owner has this VDI; this handle stays dead."""


class Stopping(StoreError):
    """The store is closing."""


class FormatError(StoreError):
    """Bytes of a zone are not what FORMAT.md says, or of a newer format."""


class NewerFormat(FormatError):
    """A newer format than this program knows; nothing was touched."""
