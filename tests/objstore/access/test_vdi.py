"""VDIs through the library, in this process and behind a server alike."""

import array
import asyncio
import random

import pytest

import objstore
from objstore import Connection, Extent, InvalidRequest, OutOfRange, ReadOnly, VdiHandle

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


async def test_a_hole_fills_any_buffer_with_zeros(vdi: VdiHandle) -> None:
    for offset, length in ((0, 4096), (1, 4096), (100, 1), (0, 2 * MIB + 5), (SIZE - 3, 3)):
        buffer = bytearray(b"\xee" * length)
        assert await vdi.readinto(offset, buffer) == length
        assert buffer == bytes(length)
        assert await vdi.read(offset, length) == bytes(length)
    buffer = bytearray(b"\xee" * 3 * 4096)
    await vdi.write(4096, b"x" * 4096)
    await vdi.readinto(0, buffer)
    assert buffer == bytes(4096) + b"x" * 4096 + bytes(4096)


@pytest.mark.parametrize("writeback", [None, True, False])
async def test_read_your_writes(vdi: VdiHandle, writeback: bool | None) -> None:
    dice = random.Random(1)
    for offset, length in ((0, 1), (4096, 4096), (511, 3 * 4096), (MIB - 1, 2 * MIB), (SIZE - 7, 7)):
        data = dice.randbytes(length)
        assert await vdi.write(offset, data, writeback=writeback) == length
        assert await vdi.read(offset, length) == data


async def test_every_kind_of_buffer(vdi: VdiHandle) -> None:
    numbers = array.array("I", range(1000))
    assert await vdi.write(10, numbers) == 4000
    back = array.array("I", bytes(4000))
    assert await vdi.readinto(10, back) == 4000
    assert back == numbers
    assert await vdi.read(10, 4000) == numbers.tobytes()
    await vdi.write(0, memoryview(bytearray(b"abcdef"))[2:4])
    assert await vdi.read(0, 3) == b"cd\0"
    part = bytearray(6)
    await vdi.readinto(0, memoryview(part)[3:5])
    assert part == b"\0\0\0cd\0"
    with pytest.raises(InvalidRequest, match="writable"):
        await vdi.readinto(0, b"abc")
    with pytest.raises(InvalidRequest, match="one behind the other"):
        await vdi.write(0, memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError):
        await vdi.write(0, "text")  # type: ignore[arg-type]


async def test_a_buffer_is_the_callers_again_when_a_write_returns(vdi: VdiHandle) -> None:
    data = bytearray(b"a" * 8192)
    await vdi.write(0, data)
    data[:] = b"b" * 8192
    assert await vdi.read(0, 8192) == b"a" * 8192


@pytest.mark.parametrize("seed", range(4))
async def test_extents_and_buffers_are_cut_independently(vdi: VdiHandle, seed: int) -> None:
    """Against a plain array: any cuts of either list, empty ones included, extents in any order."""
    dice = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(12):
        total = dice.choice((1, 4096, 70_000, 300_001))
        offsets = sorted(dice.sample(range(SIZE // (64 * KIB)), 5))
        dice.shuffle(offsets)
        cuts = sorted(dice.choices(range(total + 1), k=4))
        lengths = [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
        extents = [
            (at * 64 * KIB + dice.randrange(3) * 511, min(n, 60_000)) for at, n in zip(offsets, lengths, strict=True)
        ]
        total = sum(length for _, length in extents)
        cuts = sorted(dice.choices(range(total + 1), k=dice.randrange(6)))
        data = dice.randbytes(total)
        buffers = [data[start:end] for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
        assert await vdi.writev(extents, buffers) == total
        at = 0
        for offset, length in extents:
            model[offset : offset + length] = data[at : at + length]
            at += length
        cuts = sorted(dice.choices(range(total + 1), k=dice.randrange(6)))
        into = [bytearray(end - start) for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
        assert await vdi.readv(extents, into) == total
        assert b"".join(into) == data
    assert await vdi.read(0, SIZE) == model


async def test_lists_that_do_not_match_do_nothing(vdi: VdiHandle) -> None:
    for extents, buffers in (([(0, 5)], [b"abcd"]), ([(0, 4)], []), ([], [b"x"]), ([(0, 2), (9, 1)], [b"ab"])):
        with pytest.raises(InvalidRequest, match="bytes and the buffers"):
            await vdi.writev(extents, buffers)
    with pytest.raises(OutOfRange):
        await vdi.writev([(0, 4), (SIZE - 1, 2)], [b"abcdef"])
    with pytest.raises(InvalidRequest):
        await vdi.writev([(0, -1), (0, 2)], [b"a"])
    assert await vdi.read(0, 4096) == bytes(4096)
    assert await vdi.writev([], []) == await vdi.readv([(5, 0)], [bytearray()]) == 0


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (1 << 60, 4096), (0, SIZE + 1)])
async def test_out_of_bounds(vdi: VdiHandle, offset: int, length: int) -> None:
    await vdi.write(SIZE - 1, b"x")
    with pytest.raises(OutOfRange, match=f"size={SIZE}"):
        await vdi.read(offset, length)
    with pytest.raises(OutOfRange):
        await vdi.readinto(offset, bytearray(length))
    with pytest.raises(OutOfRange):
        await vdi.write(offset, bytes(length))
    with pytest.raises(OutOfRange):
        await vdi.zero(offset, length)
    with pytest.raises(OutOfRange):
        await vdi.discard(offset, length)
    with pytest.raises(OutOfRange):
        _ = [extent async for extent in vdi.map(offset, length)]
    assert await vdi.read(SIZE - 2, 2) == b"\0x"


async def test_negative_numbers(vdi: VdiHandle) -> None:
    with pytest.raises(InvalidRequest, match="impossible"):
        await vdi.read(-1, 1)
    with pytest.raises(InvalidRequest):
        await vdi.write(-4096, b"x")
    with pytest.raises(InvalidRequest):
        await vdi.zero(0, -1)
    with pytest.raises(InvalidRequest):
        await vdi.discard(-1, 5)


async def test_nothing_at_the_end(vdi: VdiHandle) -> None:
    assert await vdi.read(SIZE, 0) == b""
    assert await vdi.write(SIZE, b"") == 0
    await vdi.zero(SIZE, 0)
    await vdi.discard(0, 0)
    assert [extent async for extent in vdi.map(SIZE)] == []


async def test_zero_discard_and_map(vdi: VdiHandle) -> None:
    await vdi.write(0, b"x" * 64 * KIB)
    await vdi.zero(100, 8192)
    assert await vdi.read(0, 3 * 4096) == b"x" * 100 + bytes(8192) + b"x" * 3996
    await vdi.discard(16 * KIB + 1, 8 * KIB)
    assert await vdi.read(16 * KIB, 16 * KIB) == b"x" * 4096 + bytes(4096) + b"x" * 8192
    await vdi.zero(32 * KIB, 16 * KIB, no_hole=True)
    assert [extent async for extent in vdi.map()] == [
        Extent(4096, hole=False, zero=False),
        Extent(4096, hole=True, zero=True),
        Extent(12 * KIB, hole=False, zero=False),
        Extent(4096, hole=True, zero=True),
        Extent(8 * KIB, hole=False, zero=False),
        Extent(16 * KIB, hole=False, zero=True),
        Extent(16 * KIB, hole=False, zero=False),
        Extent(SIZE - 64 * KIB, hole=True, zero=True),
    ]
    assert [extent async for extent in vdi.map(40 * KIB + 1, 10)] == [Extent(10, hole=False, zero=True)]


async def test_a_long_map_is_put_together_without_seams(store: Connection) -> None:
    await store.create("big", 64 * MIB)
    async with store.open("big") as vdi:
        for block in range(0, 10_000, 2):
            await vdi.write(block * 4096, b"d" * 4096, writeback=True)
        found = [extent async for extent in vdi.map()]
        assert len(found) == 10_000
        assert sum(extent.length_bytes for extent in found) == 64 * MIB
        assert found[1:4] == [Extent(4096, True, True), Extent(4096, False, False), Extent(4096, True, True)]


async def test_writes_through_a_stale_handle_fail(store: Connection) -> None:
    await store.create("disk", MIB)
    first, second = await store.open("disk"), await store.open("disk")
    await first.write(0, b"first")
    await first.close()
    await first.close()
    assert first.closed
    for work in (first.write(0, b"stale"), first.zero(0, 4096), first.discard(0, 4096), first.flush()):
        with pytest.raises(InvalidRequest, match="the handle of VDI 'disk' was closed"):
            await work
    with pytest.raises(InvalidRequest):
        await first.read(0, 1)
    assert await second.read(0, 5) == b"first"
    await second.close()
    await store.delete("disk")
    await store.create("disk", MIB)
    with pytest.raises(InvalidRequest):
        await second.write(0, b"stale")
    async with store.open("disk") as vdi:
        assert await vdi.read(0, 4096) == bytes(4096)


async def test_a_long_write_stops_where_its_handle_is_closed(store: Connection) -> None:
    """Part of it may be there; nothing of it comes after `close` has returned."""
    await store.create("disk", 256 * MIB)
    vdi = await store.open("disk")
    data = memoryview(bytes([7]) * (8 * MIB))
    steps = [(at * 8 * MIB, 8 * MIB) for at in range(20)]
    writing = asyncio.create_task(vdi.writev(steps, [data] * 20, writeback=False))
    async with store.open("disk") as other:
        while await other.read(0, 1) == b"\0":
            pass
        await vdi.close()
        with pytest.raises(InvalidRequest):
            await writing
        state = [await other.read(at, 1) for at, _ in steps]
        assert b"\0" in state
        await other.flush()
        assert [await other.read(at, 1) for at, _ in steps] == state


async def test_read_only(store: Connection) -> None:
    await store.create("disk", MIB)
    async with store.open("disk", read_only=True) as vdi:
        assert vdi.read_only
        assert await vdi.read(0, 10) == bytes(10)
        for change in (vdi.write(0, b"x"), vdi.zero(0, 1), vdi.discard(0, 4096), vdi.writev([(0, 1)], [b"x"])):
            with pytest.raises(ReadOnly, match="'disk'"):
                await change


async def test_many_at_once(vdi: VdiHandle) -> None:
    """Partial writes of the same blocks included: each reads back, neighbours stay."""
    pieces = {offset: bytes([offset % 251 + 1]) * 100 for offset in range(0, 200 * 100, 100)}
    await asyncio.gather(*(vdi.write(offset, data, writeback=True) for offset, data in pieces.items()))
    back = await asyncio.gather(*(vdi.read(offset, 100) for offset in pieces))
    assert back == list(pieces.values())


async def test_facts(store: Connection) -> None:
    await store.create("odd", 4095, copies=1, mode="writethrough")
    async with store.open("odd") as vdi:
        assert (vdi.name, vdi.size_bytes, vdi.description) == ("odd", 4095, "writethrough, 1 copy")
        assert repr(vdi) == "<VDI 'odd' of 4095 bytes>"
        await vdi.write(4090, b"12345")
        assert await vdi.read(4089, 6) == b"\x0012345"
    assert repr(vdi) == "<VDI 'odd' of 4095 bytes, closed>"
    with pytest.raises(objstore.NotFound, match="'other'"):
        await store.open("other")


async def test_flushed_data_is_in_the_next_life(vdi: VdiHandle, store: Connection) -> None:
    await vdi.write(0, b"flushed", writeback=True)
    await vdi.flush()
    assert (await store.info("disk")).dirty_bytes == 0
    await vdi.write(4096, b"fua", writeback=False)
    assert (await store.info("disk")).dirty_bytes == 0
    await vdi.write(8192, b"later", writeback=True)
    assert (await store.info("disk")).dirty_bytes > 0
