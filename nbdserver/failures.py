"""The only place where errors become NBD error values and replies to options. Spec: proto.md, "Error values"."""

import logging
from collections.abc import Sequence
from typing import Final

from nbdserver.complaints import Complaints
from nbdserver.wire.constants import Command, ErrorValue, OptionReply
from objstore import errors
from objstore.volume.base import Volume, VolumeSource

log = logging.getLogger(__name__)

SPACE_TAKING: Final = frozenset((Command.WRITE, Command.WRITE_ZEROES))

ERRORS: Final[Sequence[tuple[type[Exception], ErrorValue, OptionReply]]] = (
    (errors.OutOfRange, ErrorValue.EINVAL, OptionReply.ERR_INVALID),
    (errors.InvalidRequest, ErrorValue.EINVAL, OptionReply.ERR_INVALID),
    (errors.ReadOnly, ErrorValue.EPERM, OptionReply.ERR_POLICY),
    (errors.NoSpace, ErrorValue.ENOSPC, OptionReply.ERR_UNKNOWN),
    (errors.NotSupported, ErrorValue.ENOTSUP, OptionReply.ERR_UNSUP),
    (errors.NotFound, ErrorValue.EIO, OptionReply.ERR_UNKNOWN),
    (errors.Unavailable, ErrorValue.EIO, OptionReply.ERR_UNKNOWN),
    (errors.Corrupt, ErrorValue.EIO, OptionReply.ERR_UNKNOWN),
    (errors.Exists, ErrorValue.EIO, OptionReply.ERR_UNKNOWN),
    (errors.FormatError, ErrorValue.EIO, OptionReply.ERR_UNKNOWN),
    (errors.Busy, ErrorValue.EIO, OptionReply.ERR_POLICY),
    (errors.Suspended, ErrorValue.EIO, OptionReply.ERR_POLICY),
    (errors.Fenced, ErrorValue.EIO, OptionReply.ERR_POLICY),
    (errors.Stopping, ErrorValue.EIO, OptionReply.ERR_SHUTDOWN),
)
"""What each error of objstore is in the transmission phase and in the handshake; the first row that matches counts.
Exceptions to it: OutOfRange of a command that takes space is ENOSPC, Stopping has no reply in transmission, and
anything that is not here is a bug: EIO, ERR_UNKNOWN, logged with its traceback."""


def error_value(error: Exception, command: int) -> ErrorValue:
    """The number that a request which failed with `error` is answered with."""
    if isinstance(error, errors.OutOfRange) and command in SPACE_TAKING:
        return ErrorValue.ENOSPC
    for kind, value, _ in ERRORS:
        if isinstance(error, kind):
            return value
    log.error("request failed for an unexpected reason command=%d", command, exc_info=error)
    return ErrorValue.EIO


def option_error(error: Exception) -> tuple[OptionReply, str]:
    """The reply to an option that could not be done because of `error`."""
    for kind, _, reply in ERRORS:
        if isinstance(error, kind):
            return reply, str(error)
    log.error("opening an export failed for an unexpected reason", exc_info=error)
    return OptionReply.ERR_UNKNOWN, "internal error of the server; see its log"


async def open_volume(source: VolumeSource, name: str, complain: Complaints) -> Volume | tuple[OptionReply, str]:
    """The volume behind an export, or what to tell the client why there is none."""
    try:
        return await source.open(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, the client gets its reply
        complain(("open", name), "export can't be opened name=%s: %s", name, error)
        return option_error(error)
