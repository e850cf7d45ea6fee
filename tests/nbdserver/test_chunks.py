"""Chunks of a read cover it exactly, whatever the holes and the damage."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.chunks import SPARSE_BYTES_MIN, Views, damaged, sparse
from nbdserver.wire.constants import Chunk
from nbdserver.wire.replies import STRUCTURED, StructuredReplies
from objstore.volume.base import Extent

OFFSET = 1 << 40
STYLE = StructuredReplies()


def parse(views: Views) -> list[tuple[int, int, int, bytes, bool]]:
    """(kind, start, length, data, done) of each chunk."""
    stream, found = b"".join(views), []
    while stream:
        _, flags, kind, cookie, size = STRUCTURED.unpack_from(stream)
        assert cookie == 5
        payload, stream = stream[20 : 20 + size], stream[20 + size :]
        if kind == Chunk.OFFSET_DATA:
            found.append((kind, struct.unpack_from(">Q", payload)[0] - OFFSET, size - 8, payload[8:], bool(flags)))
        elif kind == Chunk.OFFSET_HOLE:
            start, length = struct.unpack(">QI", payload)
            found.append((kind, start - OFFSET, length, bytes(length), bool(flags)))
        else:
            found.append((kind, struct.unpack(">Q", payload[-8:])[0] - OFFSET, 0, b"", bool(flags)))
    assert [done for *_, done in found] == [False] * (len(found) - 1) + [True]
    return found


@given(
    runs=st.lists(st.tuples(st.integers(1, 3 * SPARSE_BYTES_MIN), st.booleans()), min_size=1, max_size=6),
    uncovered=st.integers(0, 5000),
)
def test_sparse(runs: list[tuple[int, bool]], uncovered: int) -> None:
    content = b"".join(bytes(length) if zero else b"d" * length for length, zero in runs) + b"u" * uncovered
    extents = [Extent(length, hole=zero, zero=zero) for length, zero in runs]
    chunks = parse(sparse(STYLE, 5, OFFSET, memoryview(content), extents))
    at = 0
    for kind, start, length, data, _ in chunks:
        assert start == at
        assert length > 0
        assert data == content[start : start + length]
        assert kind != Chunk.OFFSET_HOLE or length >= min(SPARSE_BYTES_MIN, len(content))
        at += length
    assert at == len(content)


@given(
    gaps=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), min_size=1, max_size=8),
    tail=st.integers(0, 9000),
)
def test_damaged(gaps: list[tuple[int, int]], tail: int) -> None:
    content, bad, good = b"", [], b""
    for index, (before, length) in enumerate(gaps):
        before += index > 0
        content += b"g" * before
        good += b"g" * before + b"?" * length
        bad.append((OFFSET + len(content), length))
        content += b"b" * length
    content += b"g" * tail
    good += b"g" * tail
    chunks = parse(damaged(STYLE, 5, OFFSET, memoryview(content), bad, "rot", whole=False))
    got = bytearray(b"?" * len(content))
    for _, start, length, data, _ in chunks:
        got[start : start + length] = data
    assert got == good
    errors = [start + OFFSET for kind, start, *_ in chunks if kind == Chunk.ERROR_OFFSET]
    assert errors == [start for start, _ in bad]
    whole = parse(damaged(STYLE, 5, OFFSET, memoryview(content), bad, "rot", whole=True))
    assert [kind for kind, *_ in whole][-1] == Chunk.ERROR_OFFSET
    assert b"".join(data for *_, data, _ in whole) == b"g" * gaps[0][0]
