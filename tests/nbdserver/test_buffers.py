"""The pool's memory is bounded, waiting is fair, and nothing is lost when a waiter goes."""

import asyncio

import pytest

from nbdserver.buffers import HEAD_BYTES, IDLE_BYTES_MAX, SIZE_BYTES_MIN, BufferPool
from objstore.units import KIB, MIB


async def yield_to_others() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_buffers_are_aligned_and_have_a_head() -> None:
    buffer = BufferPool(MIB).take(100_000)
    assert buffer is not None
    assert buffer.size_bytes == 128 * KIB == len(buffer.data)
    assert len(buffer.whole) == HEAD_BYTES + 128 * KIB
    buffer.data[0] = 7
    assert buffer.whole[HEAD_BYTES] == 7


def test_limit_and_reuse() -> None:
    pool = BufferPool(MIB)
    one = pool.take(512 * KIB)
    two = pool.take(512 * KIB)
    assert one is not None
    assert two is not None
    assert pool.take(1) is None
    pool.release(one)
    assert pool.take(300 * KIB) is one
    assert pool.held_bytes == MIB


def test_smallest_size() -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(0)
    assert buffer is not None
    assert buffer.size_bytes == SIZE_BYTES_MIN


def test_one_buffer_is_always_possible() -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(64 * MIB)
    assert buffer is not None
    assert pool.take(1) is None
    pool.release(buffer)
    assert pool.held_bytes == 0


def test_idle_memory_is_bounded_and_small_buffers_stay() -> None:
    pool = BufferPool(1 << 30)
    small = pool.take(MIB)
    large = [pool.take(16 * MIB) for _ in range(3)]
    assert small is not None
    pool.release(small)
    for buffer in large:
        assert buffer is not None
        pool.release(buffer)
    assert pool._idle_bytes <= IDLE_BYTES_MAX
    assert pool.take(MIB) is small


async def test_waiters_are_served_in_order() -> None:
    pool = BufferPool(MIB)
    held = pool.take(MIB)
    assert held is not None
    got: list[str] = []

    async def wait(name: str, length: int) -> None:
        buffer = await pool.acquire(length)
        got.append(name)
        pool.release(buffer)

    tasks = [asyncio.create_task(wait("large", MIB)), asyncio.create_task(wait("small", 1))]
    await yield_to_others()
    assert pool.short
    pool.release(held)
    assert pool.take(1) is None, "who comes later does not overtake"
    await asyncio.gather(*tasks)
    assert got == ["large", "small"]
    assert pool.held_bytes == 0
    assert not pool.short


@pytest.mark.parametrize("granted", [False, True])
async def test_a_waiter_that_goes_leaves_its_place(granted: bool) -> None:
    pool = BufferPool(MIB)
    held = pool.take(MIB)
    assert held is not None
    first = asyncio.create_task(pool.acquire(MIB))
    second = asyncio.create_task(pool.acquire(MIB))
    await yield_to_others()
    if granted:
        pool.release(held)
        first.cancel()
    else:
        first.cancel()
        await yield_to_others()
        pool.release(held)
    buffer = await second
    assert first.cancelled()
    assert pool.held_bytes == MIB
    pool.release(buffer)
    assert pool.held_bytes == 0


def test_charges_count() -> None:
    pool = BufferPool(MIB)
    pool.charge(MIB + 1)
    assert pool.short
    assert pool.take(1) is None
    pool.discharge(MIB + 1)
    assert not pool.short
    assert pool.take(1) is not None
