"""How a read that is not one run of good data is cut into chunks.

Pure: extents or damage in, views to send out. Chunked styles only.
Spec: proto.md, `NBD_CMD_READ`, "Structured replies".
Holds: chunks lie inside the request, do not overlap, and only the last one is marked as the last.
"""

from collections.abc import Sequence
from typing import Final

from nbdserver.wire.constants import Chunk, ErrorValue
from nbdserver.wire.replies import Replies, data_offset, error_offset_payload, hole_payload
from objstore.units import KIB
from objstore.volume.base import Extent

SPARSE_BYTES_MIN: Final = 64 * KIB
"""A hole inside a read is sent as a hole from this length on; a chunk more costs more than a shorter one saves."""

Views = list[memoryview | bytes]


def sparse(replies: Replies, cookie: int, offset: int, data: memoryview, extents: Sequence[Extent]) -> Views:
    """A read of `data` at `offset`, with holes where `extents` say so.

    What the extents do not cover goes as data, and so do holes shorter than SPARSE_BYTES_MIN and than the read.
    """
    views: Views = []
    sent = at = 0
    length = len(data)
    for extent in extents:
        if extent.zero and extent.length_bytes >= min(SPARSE_BYTES_MIN, length):
            _add_data(views, replies, cookie, offset, data, sent, at, done=False)
            sent = at + extent.length_bytes
            header = replies.chunk(Chunk.OFFSET_HOLE, cookie, offset, 12, done=sent == length)
            views.append(header + hole_payload(offset + at, extent.length_bytes))
        at += extent.length_bytes
    _add_data(views, replies, cookie, offset, data, sent, length, done=True)
    return views


def damaged(
    replies: Replies,
    cookie: int,
    offset: int,
    data: memoryview,
    bad: Sequence[tuple[int, int]],
    text: str,
    *,
    whole: bool,
) -> Views:
    """A read whose ranges `bad` (offset, length; ascending, at least one) are damaged: the good parts as data, an error
    at the start of each bad one.

    whole: only one content chunk is allowed, so what is in front of the first bad range is all that is sent.
    """
    views: Views = []
    at = 0
    if whole:
        bad = bad[:1]
    for bad_offset, bad_length in bad:
        _add_data(views, replies, cookie, offset, data, at, bad_offset - offset, done=False)
        at = bad_offset - offset + bad_length
    if not whole:
        _add_data(views, replies, cookie, offset, data, at, len(data), done=False)
    for index, (bad_offset, _) in enumerate(bad, start=1):
        payload = error_offset_payload(ErrorValue.EIO, text, bad_offset)
        header = replies.chunk(Chunk.ERROR_OFFSET, cookie, offset, len(payload), done=index == len(bad))
        views.append(header + payload)
    return views


def _add_data(
    views: Views, replies: Replies, cookie: int, offset: int, data: memoryview, start: int, end: int, *, done: bool
) -> None:
    """A data chunk for data[start:end] of a read at `offset`; nothing if that is empty."""
    if start < end:
        header = replies.chunk(Chunk.OFFSET_DATA, cookie, offset, end - start + 8, done=done)
        views.append(header + data_offset(offset + start))
        views.append(data[start:end])
