"""Streams in and out of VDIs, in this process and behind a server."""

import random
from collections.abc import AsyncIterator

import pytest

from objstore import Connection, Extent, Hole, InvalidRequest, NoSpace, OutOfRange, ReadOnly, VdiHandle

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


async def downloaded(vdi: VdiHandle, offset: int = 0, length: int = 0) -> bytes:
    """Holes filled in."""
    parts = [part async for part in vdi.download(offset, length)]
    assert all(len(part) <= MIB for part in parts if isinstance(part, bytes))
    return b"".join(bytes(part.length_bytes) if isinstance(part, Hole) else part for part in parts)


async def holes(vdi: VdiHandle) -> list[Extent]:
    return [extent async for extent in vdi.map() if extent.hole]


async def test_download(vdi: VdiHandle) -> None:
    dice = random.Random(1)
    model = bytearray(SIZE)
    for offset, length in ((5, 100), (MIB, 3 * MIB), (7 * MIB, MIB)):
        data = dice.randbytes(length)
        await vdi.write(offset, data)
        model[offset : offset + length] = data
    for offset, length in ((0, 0), (0, 10), (3, 4 * MIB), (MIB + 1, 3 * MIB), (SIZE - 1, 1), (SIZE - 1, 0), (SIZE, 0)):
        assert await downloaded(vdi, offset, length) == model[offset : offset + length if length else SIZE]
    assert sum(isinstance(part, Hole) for part in [part async for part in vdi.download()]) == 2
    for offset, length in ((0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (-1, 1)):
        with pytest.raises(InvalidRequest):
            await downloaded(vdi, offset, length)


@pytest.mark.parametrize("seed", range(6))
async def test_upload_of_any_pieces(vdi: VdiHandle, seed: int) -> None:
    """Over what was there, from any offset, cut anywhere, zeros and holes in it."""
    dice = random.Random(seed)
    model = bytearray(dice.randbytes(SIZE))
    await vdi.write(0, model)
    offset = dice.choice((0, 4096, 511, MIB + 1))
    items: list[bytes | Hole] = []
    for _ in range(40):
        length = dice.choice((0, 1, 100, 4096, 5000, 12_288, 200_000))
        items.append(dice.choice((Hole(length), bytes(length), dice.randbytes(length), dice.randbytes(length))))
    whole = b"".join(bytes(item.length_bytes) if isinstance(item, Hole) else item for item in items)
    whole = whole[: SIZE - offset]
    assert await vdi.upload(items, offset) == len(whole)
    model[offset : offset + len(whole)] = whole
    assert await downloaded(vdi) == model


async def test_zeros_and_holes_of_a_stream_are_holes(vdi: VdiHandle) -> None:
    await vdi.write(0, b"x" * SIZE)
    await vdi.upload([b"a" * 4096 + bytes(8192) + b"b" * 100, bytes(8092), Hole(MIB - 20_480), bytes(MIB)])
    assert await holes(vdi) == [Extent(8192, True, True), Extent(2 * MIB - 16 * KIB, True, True)]
    assert await downloaded(vdi, 0, 2 * MIB + 1) == (
        b"a" * 4096 + bytes(8192) + b"b" * 100 + bytes(2 * MIB - 12_388) + b"x"
    )


async def test_a_short_stream_is_reported_with_its_count(vdi: VdiHandle) -> None:
    await vdi.write(0, b"x" * 3 * MIB)

    async def short() -> AsyncIterator[bytes]:
        yield b"a" * 100
        yield b"b" * 5000

    assert await vdi.upload(short(), 10, 2 * MIB) == 5100
    assert await vdi.read(0, 3 * MIB) == b"x" * 10 + b"a" * 100 + b"b" * 5000 + b"x" * (3 * MIB - 5110)
    assert await vdi.upload(short(), 10, 2 * MIB, zero_rest=True) == 5100
    assert await vdi.read(0, 3 * MIB) == (
        b"x" * 10 + b"a" * 100 + b"b" * 5000 + bytes(2 * MIB - 5100) + b"x" * (MIB - 10)
    )
    assert await vdi.upload([], 0, 4096) == 0
    assert await vdi.read(0, 5) == b"x" * 5


@pytest.mark.parametrize("more", [b"c", Hole(1), b"c" * 3 * MIB])
async def test_a_stream_that_is_too_long_is_an_error(vdi: VdiHandle, more: bytes | Hole) -> None:
    await vdi.write(0, b"x" * 16 * KIB)
    with pytest.raises(InvalidRequest, match="longer than the 8000 bytes"):
        await vdi.upload([b"a" * 7999, b"b", more], 100, 8000)
    assert await vdi.read(0, 16 * KIB) == b"x" * 100 + b"a" * 7999 + b"b" + b"x" * (16 * KIB - 8100)
    with pytest.raises(InvalidRequest, match=f"longer than the {100} bytes"):
        await vdi.upload([b"a" * 101], SIZE - 100)
    assert await vdi.read(SIZE - 101, 101) == b"\0" + b"a" * 100


async def test_what_upload_refuses_before_it_begins(store: Connection, vdi: VdiHandle) -> None:
    for offset, length in ((0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0)):
        with pytest.raises(OutOfRange):
            await vdi.upload([b"x"], offset, length)
    with pytest.raises(InvalidRequest, match="hole of -1"):
        await vdi.upload([Hole(-1)])
    async with store.open("disk", read_only=True) as reader:
        with pytest.raises(ReadOnly):
            await reader.upload([b"x"])
    assert await holes(vdi) == [Extent(SIZE, True, True)]


async def test_what_was_uploaded_is_durable(vdi: VdiHandle, store: Connection) -> None:
    await vdi.upload([random.Random(1).randbytes(3 * MIB)])
    assert (await store.info("disk")).dirty_bytes == 0


async def test_an_error_of_the_stream_comes_out(vdi: VdiHandle) -> None:
    def broken() -> "AsyncIterator[bytes]":
        raise NoSpace("of the source")

    async def stream() -> AsyncIterator[bytes]:
        yield b"x" * 2 * MIB
        broken()

    with pytest.raises(NoSpace, match="of the source"):
        await vdi.upload(stream())
