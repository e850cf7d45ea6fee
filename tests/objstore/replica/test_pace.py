"""Work in the background makes way for clients, and no longer than they are there."""

import asyncio
from collections.abc import Iterator

import pytest

from objstore.replica.pace import LOOK_SECONDS, REST_SECONDS, Courtesy
from tests.support.sim_loop import SimClock, SimLoop

SHARE = 0.1


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(now=100.0)
    yield loop
    loop.discard()


class Clients:
    """They make `rate` requests a second for `seconds`."""

    def __init__(self, loop: SimLoop, rate: float, seconds: float) -> None:
        self._loop = loop
        self._rate = rate
        self._began = loop.now
        self._seconds = seconds

    def requests(self) -> int:
        return int(self._rate * min(self._loop.now - self._began, self._seconds))


def work(loop: SimLoop, clients: Clients, pieces: int, worked_seconds: float) -> float:
    """Seconds that so many pieces take."""
    courtesy = Courtesy(SimClock(loop), clients.requests, SHARE)

    async def pass_() -> None:
        for _ in range(pieces):
            await asyncio.sleep(worked_seconds)
            await courtesy.make_way(worked_seconds)

    began = loop.now
    loop.run_until_complete(pass_())
    return loop.now - began


@pytest.mark.parametrize(("pieces", "worked_seconds"), [(3000, 0.002), (100, 0.2), (20, 3.0)])
def test_it_takes_its_share_while_clients_are_active(loop: SimLoop, pieces: int, worked_seconds: float) -> None:
    seconds = work(loop, Clients(loop, 1000.0, 1e6), pieces, worked_seconds)
    assert seconds == pytest.approx(pieces * worked_seconds / SHARE, rel=0.01)


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_it_does_not_rest_where_nobody_or_hardly_anybody_asks(loop: SimLoop, rate: float) -> None:
    assert work(loop, Clients(loop, rate, 1e6), 20, 0.3) == pytest.approx(20 * 0.3)


def test_a_rest_ends_soon_after_clients_have_become_quiet(loop: SimLoop) -> None:
    # The first rest would last until second 40.
    assert 10.0 <= work(loop, Clients(loop, 1000.0, 10.0), 1, 4.0) <= 10.0 + 2 * REST_SECONDS


def test_what_was_asked_long_ago_is_not_taken_for_activity(loop: SimLoop) -> None:
    courtesy = Courtesy(SimClock(loop), Clients(loop, 100.0, 1.0).requests, SHARE)

    async def main() -> bool:
        await asyncio.sleep(60.0)
        return courtesy.crowded()

    assert not loop.run_until_complete(main())


def test_clients_that_come_are_noticed_at_the_next_look(loop: SimLoop) -> None:
    asked = 0
    courtesy = Courtesy(SimClock(loop), lambda: asked, SHARE)

    async def main() -> list[bool]:
        nonlocal asked
        found = []
        for count in (0, 1, 0, 2, 0):
            asked += count
            await asyncio.sleep(1.1 * LOOK_SECONDS)
            found.append(courtesy.crowded())
        return found

    assert loop.run_until_complete(main()) == [False, True, False, True, False]


def test_who_rests_is_let_go_at_the_end(loop: SimLoop) -> None:
    courtesy = Courtesy(SimClock(loop), Clients(loop, 100.0, 1e6).requests, SHARE)

    async def main() -> float:
        await asyncio.sleep(1.0)
        rest = loop.create_task(courtesy.make_way(60.0))
        await asyncio.sleep(1.0)
        assert not rest.done()
        courtesy.release()
        await rest
        await courtesy.make_way(60.0)
        return loop.now

    assert loop.run_until_complete(main()) == pytest.approx(102.0)
