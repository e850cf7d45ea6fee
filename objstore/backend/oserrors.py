"""Turns errors of the operating system into the errors of the backend contract, in one place."""

import errno
import os
from types import TracebackType
from typing import Final

from objstore.backend.base import ZoneFailed
from objstore.errors import Exists, NoSpace, NotFound, StoreError

FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def translated(error: OSError, zone: str, call: str, name: str) -> StoreError:
    """What the contract calls `error`, which `call` on object `name` of the zone at path `zone` met."""
    number = error.errno
    where = _where(error, zone, call, name)
    if number == errno.ENOENT:
        return NotFound(f"no such object: {where}")
    if number == errno.EEXIST:
        return Exists(f"the name is taken: {where}")
    if number in FULL_ERRNOS:
        return NoSpace(f"the zone is full: {where}")
    return failed(error, zone, call, name)


def failed(error: OSError, zone: str, call: str, name: str) -> ZoneFailed:
    """`error` as the end of this view of the zone, whatever its errno."""
    return ZoneFailed(f"{os.strerror(error.errno or 0)}: {_where(error, zone, call, name)}")


def _where(error: OSError, zone: str, call: str, name: str) -> str:
    number = error.errno or 0
    return f"call={call} name={name} zone={zone} errno={errno.errorcode.get(number, number)}"


class translating:
    """with translating(zone, call, name): an OSError of the body leaves as the contract's error."""

    __slots__ = ("_call", "_name", "_zone")

    def __init__(self, zone: str, call: str, name: str) -> None:
        self._zone = zone
        self._call = call
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise translated(error, self._zone, self._call, self._name) from error
