"""What every volume keeps: the suite behind objstore/volume/base.py.

A test class derives from VolumeContract and gives it a fixture `make` that opens a fresh volume of a size, read-only on
request, and closes what it made. The tests use any volume as the network side does: first the call that may not be able
to, then the one that waits.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise

import pytest

from objstore.errors import InvalidRequest, NotSupported, OutOfRange, ReadOnly
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.base import REQUEST_BYTES_MAX, Extent, Volume

SIZE_BYTES = 16 * MIB

MakeVolume = Callable[..., Awaitable[Volume]]
"""make(size_bytes=SIZE_BYTES, *, read_only=False)"""


async def put(volume: Volume, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
    """Write as the network side does."""
    view = memoryview(data)
    if fua or not volume.write_now(offset, view):
        await volume.write(offset, view, fua=fua)


async def get(volume: Volume, offset: int, length: int) -> bytes:
    """Read as the network side does; zeros that were not filled in are filled in here."""
    into = memoryview(bytearray(b"\xee") * length)
    zeros = volume.read_now(offset, length, into)
    if zeros < 0:
        zeros = await volume.read(offset, length, into)
    assert 0 <= zeros <= length
    if length and zeros == length:
        assert into.tobytes() == b"\xee" * length or into.tobytes() == bytes(length), "all zeros, yet data was written"
        return bytes(length)
    return into.tobytes()


async def all_extents(volume: Volume, offset: int, length: int, *, extents_max: int = 1 << 14) -> list[Extent]:
    """The state of the whole range, asked for again behind the last extent until it is covered."""
    found: list[Extent] = []
    at = offset
    while at < offset + length:
        part = await volume.extents(at, offset + length - at, extents_max=extents_max)
        assert 1 <= len(part) <= extents_max
        assert all(extent.length_bytes > 0 for extent in part)
        assert all(extent.zero or not extent.hole for extent in part), "a hole reads as zeros"
        for one, two in pairwise(part):
            assert (one.hole, one.zero) != (two.hole, two.zero), "neighbours of equal state are merged"
        at += sum(extent.length_bytes for extent in part)
        assert at <= offset + length, "extents pass the end of the range"
        found += part
    return found


def bytes_of_state(extents: list[Extent], offset: int) -> Iterator[tuple[int, int, Extent]]:
    for extent in extents:
        yield offset, offset + extent.length_bytes, extent
        offset += extent.length_bytes


class VolumeContract:
    """Derive, and give a fixture `make`: MakeVolume."""

    @pytest.fixture
    async def volume(self, make: MakeVolume) -> Volume:
        return await make(SIZE_BYTES)

    async def test_facts(self, make: MakeVolume) -> None:
        volume = await make(SIZE_BYTES)
        assert volume.size_bytes == SIZE_BYTES
        assert volume.name
        assert isinstance(volume.description, str)
        assert not volume.read_only

    async def test_fresh_volume_is_a_hole(self, volume: Volume) -> None:
        assert await get(volume, 0, 256 * KIB) == bytes(256 * KIB)
        assert await all_extents(volume, 0, SIZE_BYTES) == [Extent(SIZE_BYTES, hole=True, zero=True)]

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 1),
            (0, BLOCK_BYTES),
            (1, BLOCK_BYTES),
            (511, 3 * BLOCK_BYTES),
            (BLOCK_BYTES - 1, 2),
            (3 * MIB + 7, 2 * MIB),
        ],
    )
    async def test_read_your_writes(self, volume: Volume, offset: int, length: int) -> None:
        data = random.Random(length).randbytes(length)
        await put(volume, offset, data)
        assert await get(volume, offset, length) == data
        before = max(0, offset - BLOCK_BYTES)
        around = await get(volume, before, offset - before + length + BLOCK_BYTES)
        assert around == bytes(offset - before) + data + bytes(BLOCK_BYTES)

    async def test_length_zero(self, volume: Volume) -> None:
        for offset in (0, 5, SIZE_BYTES):
            await put(volume, offset, b"")
            await volume.write(offset, memoryview(b""), fua=True)
            assert await get(volume, offset, 0) == b""
            await volume.trim(offset, 0)
            await volume.zero(offset, 0)
            await volume.cache(offset, 0)
        assert await all_extents(volume, 0, SIZE_BYTES) == [Extent(SIZE_BYTES, hole=True, zero=True)]

    async def test_last_bytes(self, make: MakeVolume) -> None:
        size = MIB + 4 * BLOCK_BYTES
        volume = await make(size)
        await put(volume, size - 3, b"end")
        assert await get(volume, size - 5, 5) == b"\0\0end"

    async def test_largest_request(self, make: MakeVolume) -> None:
        volume = await make(2 * REQUEST_BYTES_MAX)
        data = random.Random(3).randbytes(MIB) * (REQUEST_BYTES_MAX // MIB)
        await put(volume, 4 * KIB, data)
        assert await get(volume, 4 * KIB, REQUEST_BYTES_MAX) == data
        with pytest.raises(InvalidRequest):
            await volume.read(0, REQUEST_BYTES_MAX + 1, memoryview(bytearray(REQUEST_BYTES_MAX + 1)))
        with pytest.raises(InvalidRequest):
            await volume.write(0, memoryview(bytes(REQUEST_BYTES_MAX + 1)))
        assert await get(volume, 0, 4 * KIB) == bytes(4 * KIB)

    @pytest.mark.parametrize(
        ("offset", "length"), [(SIZE_BYTES - 1, 2), (SIZE_BYTES, 1), (1 << 63, 1), ((1 << 64) - 1, 4)]
    )
    async def test_past_the_end(self, volume: Volume, offset: int, length: int) -> None:
        await put(volume, SIZE_BYTES - 1, b"x")
        data = memoryview(b"y" * length)
        into = memoryview(bytearray(length))
        with pytest.raises(OutOfRange):
            volume.read_now(offset, length, into)
        with pytest.raises(OutOfRange):
            await volume.read(offset, length, into)
        with pytest.raises(OutOfRange):
            await put(volume, offset, b"y" * length)
        with pytest.raises(OutOfRange):
            await volume.write(offset, data)
        for change in (volume.trim, volume.zero, volume.cache, volume.extents):
            with pytest.raises(OutOfRange):
                await change(offset, length)
        assert await get(volume, SIZE_BYTES - 2, 2) == b"\0x"

    async def test_negative_ranges(self, volume: Volume) -> None:
        with pytest.raises(InvalidRequest):
            await volume.read(-1, 1, memoryview(bytearray(1)))
        with pytest.raises(InvalidRequest):
            await volume.write(-4096, memoryview(b"x"))
        with pytest.raises(InvalidRequest):
            await volume.trim(4096, -1)
        with pytest.raises(InvalidRequest):
            await volume.zero(-1, 1)

    async def test_read_only(self, make: MakeVolume) -> None:
        volume = await make(SIZE_BYTES, read_only=True)
        assert volume.read_only
        assert await get(volume, 0, 4096) == bytes(4096)
        with pytest.raises(ReadOnly):
            await put(volume, 0, b"x")
        with pytest.raises(ReadOnly):
            await volume.write(0, memoryview(b"x"))
        with pytest.raises(ReadOnly):
            await volume.trim(0, 4096)
        with pytest.raises(ReadOnly):
            await volume.zero(0, 4096)
        await volume.flush()
        await volume.cache(0, 4096)

    async def test_zeros_are_counted(self, volume: Volume) -> None:
        await put(volume, 64 * KIB, b"d" * 16 * KIB)
        into = memoryview(bytearray(64 * KIB))
        zeros = await volume.read(32 * KIB, 64 * KIB, into)
        assert zeros == 48 * KIB
        assert into.tobytes() == bytes(32 * KIB) + b"d" * 16 * KIB + bytes(16 * KIB)
        assert await volume.read(64 * KIB, 16 * KIB, into[: 16 * KIB]) == 0
        assert await volume.read(0, 64 * KIB, into) == 64 * KIB

    async def test_written_zeros_are_read(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 8192)
        await put(volume, 0, bytes(8192))
        assert await get(volume, 0, 8192) == bytes(8192)

    async def test_borrowed_data(self, volume: Volume) -> None:
        data = bytearray(b"a" * 8192)
        await put(volume, 0, memoryview(data))
        data[:] = b"b" * 8192
        assert await get(volume, 0, 8192) == b"a" * 8192

    async def test_trim_whole_blocks(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 16 * KIB)
        await volume.trim(1, 16 * KIB - 2)
        expected = b"x" * 4096 + bytes(8192) + b"x" * 4096
        assert await get(volume, 0, 16 * KIB) == expected
        assert await all_extents(volume, 0, 16 * KIB) == [
            Extent(4096, hole=False, zero=False),
            Extent(8192, hole=True, zero=True),
            Extent(4096, hole=False, zero=False),
        ]
        await volume.trim(100, 200)
        assert await get(volume, 0, 16 * KIB) == expected
        await volume.trim(0, SIZE_BYTES, fua=True)
        assert await all_extents(volume, 0, SIZE_BYTES) == [Extent(SIZE_BYTES, hole=True, zero=True)]

    async def test_zero(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 16 * KIB)
        await volume.zero(100, 8192)
        assert await get(volume, 0, 16 * KIB) == b"x" * 100 + bytes(8192) + b"x" * (8192 - 100)

    @pytest.mark.parametrize("over_data", [False, True])
    async def test_zero_without_hole(self, volume: Volume, over_data: bool) -> None:
        if over_data:
            await put(volume, 0, b"x" * MIB)
        await volume.zero(0, MIB, no_hole=True)
        assert await get(volume, 0, MIB) == bytes(MIB)
        for start, end, extent in bytes_of_state(await all_extents(volume, 0, 2 * MIB), 0):
            assert extent.hole == (start >= MIB), f"{start}-{end}"
        await volume.trim(0, MIB)
        assert await all_extents(volume, 0, 2 * MIB) == [Extent(2 * MIB, hole=True, zero=True)]

    async def test_fast_zero(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 16 * KIB)
        with pytest.raises(NotSupported):
            await volume.zero(100, 200, fast=True)
        with pytest.raises(NotSupported):
            await volume.zero(4096, 8192 + 1, fast=True)
        assert await get(volume, 0, 16 * KIB) == b"x" * 16 * KIB
        await volume.zero(4096, 8192, fast=True)
        assert await get(volume, 0, 16 * KIB) == b"x" * 4096 + bytes(8192) + b"x" * 4096

    async def test_extents_are_bounded(self, volume: Volume) -> None:
        for block in range(0, 64, 2):
            await put(volume, block * BLOCK_BYTES, b"x" * BLOCK_BYTES)
        for extents_max in (1, 5, 1 << 14):
            found = await all_extents(volume, 0, SIZE_BYTES, extents_max=extents_max)
            assert sum(extent.length_bytes for extent in found) == SIZE_BYTES
            assert [extent.zero for extent in found[:8]] == [False, True] * 4
        (one,) = await volume.extents(10, 100, extents_max=1)
        assert one == Extent(100, hole=False, zero=False)
        with pytest.raises(InvalidRequest):
            await volume.extents(0, 0)

    async def test_flush_state_changes_with_every_change(self, volume: Volume) -> None:
        """0 only where nothing awaits durability; equal numbers only where nothing was changed in between."""
        await volume.flush()
        seen = []
        for offset in (0, 8192, 0):
            if not volume.write_now(offset, memoryview(b"x" * 4096)):
                await volume.write(offset, memoryview(b"x" * 4096))
            seen.append(volume.flush_state())
        awaited = [state for state in seen if state]
        assert len(set(awaited)) == len(awaited)
        await volume.flush()
        assert volume.flush_state() not in awaited

    async def test_flush_and_fua(self, volume: Volume) -> None:
        await volume.flush()
        await put(volume, 0, b"one", fua=True)
        await put(volume, 8192, b"two")
        await volume.flush()
        await volume.zero(0, 4096, fua=True)
        assert await get(volume, 8192, 3) == b"two"
        assert await get(volume, 0, 4096) == bytes(4096)

    async def test_cache_changes_nothing(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 4096)
        await volume.cache(0, SIZE_BYTES)
        assert await get(volume, 0, 8192) == b"x" * 4096 + bytes(4096)

    async def test_writes_of_the_dead_are_dropped(self, volume: Volume) -> None:
        await put(volume, 0, b"x" * 4096)

        def gone() -> bool:
            return False

        with pytest.raises(InvalidRequest):
            await volume.write(0, memoryview(b"y" * 4096), alive=gone)
        with pytest.raises(InvalidRequest):
            await volume.trim(0, 4096, alive=gone)
        with pytest.raises(InvalidRequest):
            await volume.zero(0, 4096, alive=gone)
        assert await get(volume, 0, 4096) == b"x" * 4096

    @pytest.mark.parametrize("seed", range(6))
    async def test_like_a_bytearray(self, volume: Volume, seed: int) -> None:
        """Any sequence of changes reads as it would from a plain array of bytes."""
        dice = random.Random(seed)
        size = 2 * MIB
        model = bytearray(size)
        for _ in range(120):
            grain = dice.choice((1, 512, BLOCK_BYTES))
            offset = dice.randrange(size // grain) * grain
            length = min(size - offset, dice.choice((1, 3, 9, 70)) * max(grain, 256))
            action = dice.choice(("write", "write", "write", "zero", "reserve", "trim", "flush", "read"))
            if action == "write":
                data = dice.randbytes(length)
                await put(volume, offset, data, fua=dice.random() < 0.1)
                model[offset : offset + length] = data
            elif action in ("zero", "reserve"):
                await volume.zero(offset, length, no_hole=action == "reserve")
                model[offset : offset + length] = bytes(length)
            elif action == "trim":
                await volume.trim(offset, length)
                first = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
                end = (offset + length) // BLOCK_BYTES * BLOCK_BYTES
                if end > first:
                    model[first:end] = bytes(end - first)
            elif action == "flush":
                await volume.flush()
            else:
                assert await get(volume, offset, length) == model[offset : offset + length]
        assert await get(volume, 0, size) == model
        for start, end, extent in bytes_of_state(await all_extents(volume, 0, size), 0):
            if extent.zero:
                assert not any(model[start:end]), f"extent {start}-{end} is not zero"
