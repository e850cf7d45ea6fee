"""Token buckets in virtual time: rates, bursts, who goes next, and what happens when limits change."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import pytest

from objstore.errors import InvalidRequest
from objstore.format.catalog import Limit
from objstore.volume.settings import LIMIT_KINDS
from objstore.volume.throttle import BURST_SECONDS, Throttle, checked
from tests.support.sim_loop import SimLoop


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(1000.0)
    yield loop
    loop.close()


def _throttle(loop: SimLoop, **limits: int | tuple[int, int]) -> Throttle:
    return Throttle(_limits(limits), loop)


def _limits(limits: Mapping[str, int | tuple[int, int]]) -> dict[str, Limit]:
    return {
        kind.replace("_", "-"): Limit(*value) if isinstance(value, tuple) else Limit(value)
        for kind, value in limits.items()
    }


async def _client(throttle: Throttle, done: Counter[Any], *, write: bool, length_bytes: int, depth: int) -> None:
    """Keeps `depth` requests in flight for ever; done: by the client's task, and by direction."""
    owner = asyncio.current_task()

    async def one() -> None:
        while True:
            if not throttle.take(write=write, length_bytes=length_bytes):
                assert await throttle.wait(owner, write=write, length_bytes=length_bytes)
            done[owner] += 1
            done["write" if write else "read"] += 1
            await asyncio.sleep(1e-5)

    await asyncio.gather(*(one() for _ in range(depth)))


def _run(loop: SimLoop, seconds: float, *clients: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """The clients' tasks, ended after so many virtual seconds."""

    async def run() -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(client) for client in clients]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return tasks

    return loop.run_until_complete(run())


@pytest.mark.parametrize("kind", LIMIT_KINDS)
@pytest.mark.parametrize("rate", [1, 37, 1000, 8000])
@pytest.mark.parametrize("depth", [1, 32])
def test_limits_hold_over_ten_seconds(loop: SimLoop, kind: str, rate: int, depth: int) -> None:
    length = 4096
    of_bytes = kind.startswith("bytes")
    throttle = Throttle({kind: Limit(rate * length if of_bytes else rate)}, loop)
    done: Counter[Any] = Counter()
    _run(loop, 10, _client(throttle, done, write=not kind.endswith("read"), length_bytes=length, depth=depth))
    allowed = rate * 10 + max(1.0, rate * BURST_SECONDS) + 1
    assert rate * 10 * 0.97 - 1 <= done["read"] + done["write"] <= allowed * 1.01


def test_both_directions_share_what_is_limited_together(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops=1000)
    done: Counter[Any] = Counter()
    _run(
        loop,
        10,
        _client(throttle, done, write=True, length_bytes=4096, depth=64),
        _client(throttle, done, write=False, length_bytes=4096, depth=4),
    )
    assert 9700 <= done["read"] + done["write"] <= 10_200
    assert 0.4 < done["read"] / (done["read"] + done["write"]) < 0.6


def test_writes_at_their_limit_hold_up_no_reads(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops_write=10)
    done: Counter[Any] = Counter()
    _run(
        loop,
        1,
        _client(throttle, done, write=True, length_bytes=4096, depth=64),
        _client(throttle, done, write=False, length_bytes=4096, depth=1),
    )
    assert done["write"] <= 12
    assert done["read"] > 50_000


def test_connections_take_turns_whatever_their_depth(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops=1000)
    done: Counter[Any] = Counter()
    deep, shallow = _run(
        loop,
        10,
        _client(throttle, done, write=False, length_bytes=4096, depth=128),
        _client(throttle, done, write=False, length_bytes=4096, depth=2),
    )
    assert 0.8 < done[shallow] / done[deep] < 1.2


def test_a_burst_is_saved_up_and_used_once(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops=(100, 500))
    done: Counter[Any] = Counter()
    _run(loop, 0.001, _client(throttle, done, write=False, length_bytes=0, depth=1000))
    assert done["read"] in (500, 501)
    done.clear()
    _run(loop, 1, _client(throttle, done, write=False, length_bytes=0, depth=1))
    assert 95 <= done["read"] <= 102


def test_a_request_longer_than_the_burst_goes_and_is_paid_for(loop: SimLoop) -> None:
    throttle = _throttle(loop, bytes=1 << 20)
    done: Counter[Any] = Counter()
    _run(loop, 65, _client(throttle, done, write=True, length_bytes=32 << 20, depth=2))
    assert done["write"] == 3, "one at once, then one for each 32 s"


def test_other_limits_count_at_once(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops=1)
    done: Counter[Any] = Counter()

    async def change() -> None:
        await asyncio.sleep(1)
        before = done["read"]
        assert before <= 3
        throttle.set(_limits({"iops": 1000}))
        await asyncio.sleep(1)
        assert 950 <= done["read"] - before <= 1110
        throttle.set({})
        assert not throttle.waiting
        await asyncio.sleep(0.1)
        assert done["read"] - before > 5000

    (_, changed) = _run(loop, 2.2, _client(throttle, done, write=False, length_bytes=0, depth=8), change())
    assert not changed.cancelled()
    changed.result()


def test_a_new_limit_forgives_no_debt(loop: SimLoop) -> None:
    throttle = _throttle(loop, bytes=1000)
    assert throttle.take(write=True, length_bytes=10_000)
    throttle.set(_limits({"bytes": 1000, "iops": 5}))
    assert not throttle.take(write=True, length_bytes=1)


@pytest.mark.parametrize("go", [False, True])
def test_who_is_dismissed_waits_no_longer(loop: SimLoop, go: bool) -> None:
    throttle = _throttle(loop, iops=1)

    async def run() -> None:
        assert throttle.take(write=False, length_bytes=0)
        ours = [asyncio.create_task(throttle.wait("a", write=write, length_bytes=0)) for write in (True, False)]
        other = asyncio.create_task(throttle.wait("b", write=True, length_bytes=0))
        await asyncio.sleep(0)
        assert throttle.waiting == 3
        throttle.dismiss("a", go=go)
        assert await asyncio.gather(*ours) == [go, go]
        assert throttle.waiting == 1
        assert await other

    loop.run_until_complete(run())


def test_a_request_that_was_given_up_takes_nobodys_turn(loop: SimLoop) -> None:
    throttle = _throttle(loop, iops=10)

    async def run() -> None:
        while throttle.take(write=False, length_bytes=0):
            pass
        given_up = [asyncio.create_task(throttle.wait("a", write=False, length_bytes=0)) for _ in range(50)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        await asyncio.wait(given_up)
        started = loop.time()
        assert await throttle.wait("b", write=False, length_bytes=0)
        assert loop.time() - started < 0.3, "fifty turns of 0.1 s each were not waited for"

    loop.run_until_complete(run())


@pytest.mark.parametrize(
    ("limits", "named"),
    [({"iop": Limit(1)}, "'iop'"), ({"iops": Limit(-1)}, "iops"), ({"bytes": Limit(1, 1 << 60)}, "bytes")],
)
def test_impossible_limits_are_named(limits: dict[str, Limit], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        checked(limits)


def test_rate_0_is_no_limit() -> None:
    assert checked({"iops": Limit(0, 5), "bytes": Limit(7)}) == {"bytes": Limit(7)}
