"""Buffers of callers: views of them, and lists of them cut against lists of extents."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from objstore.errors import InvalidRequest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Buffer: TypeAlias = ReadableBuffer  # collections.abc.Buffer from Python 3.12 on
else:
    Buffer = object


def readable(buffer: Buffer) -> memoryview:
    """The buffer as bytes. TypeError: it is none; InvalidRequest: it is not contiguous."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    try:
        return view.cast("B")
    except TypeError as error:
        raise InvalidRequest(f"the buffer's bytes do not lie one behind the other: {error}") from error


def writable(buffer: Buffer) -> memoryview:
    """As readable. InvalidRequest: it can't be written."""
    view = readable(buffer)
    if view.readonly:
        raise InvalidRequest("a buffer to read into must be writable")
    return view


def cut(extents: Sequence[tuple[int, int]], views: Sequence[memoryview]) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Each extent (offset, length in bytes) with the pieces of the buffers that lie in it, empty extents left out.

    Both lists are one run of bytes each; where one is cut says nothing about the other. InvalidRequest, before the
    first is given: the runs differ in length, or a length is negative.
    """
    wanted, given = sum(length for _, length in extents), sum(map(len, views))
    if any(length < 0 for _, length in extents):
        raise InvalidRequest("an extent has a negative length")
    if wanted != given:
        raise InvalidRequest(f"the extents have {wanted} bytes and the buffers {given}")
    return _pieces(extents, views)


def _pieces(
    extents: Sequence[tuple[int, int]], views: Sequence[memoryview]
) -> Iterator[tuple[int, int, list[memoryview]]]:
    rest = iter(views)
    view = memoryview(b"")
    for offset, length in extents:
        pieces = []
        left = length
        while left:
            while not view:
                view = next(rest)
            pieces.append(view[:left])
            left -= len(pieces[-1])
            view = view[len(pieces[-1]) :]
        if pieces:
            yield offset, length, pieces
