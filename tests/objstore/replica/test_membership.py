"""Changing an epoch: what it takes, what a death in between leaves, and zones that fail or hang meanwhile."""

import asyncio
import random

import pytest

from objstore.backend.memory import MemoryStorage
from objstore.errors import Unavailable
from objstore.format.document import CatalogHead, Epoch, Member, decode_document
from objstore.replica.epochs import Choice, History, choose_epoch
from objstore.replica.membership import Membership, Plan
from objstore.replica.zone import Zone
from tests.conftest import ExpectedWarnings
from tests.support.stepping import HandClock, SteppingExecutor, WatchedBackend, failing, turns

HEAD = CatalogHead(snapshot=0, generation=0, first_number=0, position=0, previous_crc=0)


class Cluster:
    """Zones of a store and the process that keeps their membership."""

    def __init__(self, count: int) -> None:
        self.storages = [MemoryStorage() for _ in range(count)]
        self.rng = random.Random(3)
        self.backends: list[WatchedBackend] = []
        self.membership: Membership
        self.executor: SteppingExecutor
        self.changes: list[frozenset[int]] = []
        self._left = 1000
        self.answer_seconds = 5.0

    def die_after(self, puts: int) -> None:
        """The process does so many puts more and no call after them."""
        self._left = puts
        for backend in self.backends:
            backend.fault = self._count
        self.executor.dead = not puts

    def _count(self, call: str, name: str) -> None:
        self._left -= call == "put"
        if self._left <= 0:
            self.executor.dead = True

    def held(self, here: list[int]) -> dict[str, list[Epoch]]:
        return {
            zone_name(z): [
                decode_document("epoch", bytes(data), Epoch, name)
                for name, data in self.storages[z].objects.items()
                if name.startswith("epoch/")
            ]
            for z in here
        }

    def choose(self, here: list[int] | None = None) -> Choice:
        return choose_epoch(self.held(list(range(len(self.storages))) if here is None else here))

    async def start(self, here: list[int] | None = None) -> Membership:
        here = list(range(len(self.storages))) if here is None else here
        choice = self.choose(here)
        self.backends = [WatchedBackend(storage) for storage in self.storages]
        zones = [Zone(i, bytes.fromhex(zone_name(i)), b, f"/{i}") for i, b in enumerate(self.backends)]
        self.executor = SteppingExecutor()
        self.die_after(self._left)
        history = History(choice.chain, choice.holders)
        self.membership = Membership(
            zones,
            self.executor,
            HandClock(),
            self.rng,
            history=history,
            highest=choice.highest,
            answer_seconds=self.answer_seconds,
        )
        self.membership.on_change(lambda: self.changes.append(self.membership.in_service))
        members = {z: Member(number=z, id=zone_name(z), path=f"/{z}") for z in here}
        await self.membership.start(Plan(members, {}, HEAD), choice.epoch, choice.quorums)
        return self.membership


def zone_name(number: int) -> str:
    return f"{number + 1:032x}"


def numbers(epoch: Epoch | None) -> list[int]:
    assert epoch is not None
    return [member.number for member in epoch.members]


async def test_a_start_is_an_epoch_of_those_who_are_there() -> None:
    cluster = Cluster(3)
    first = (await cluster.start()).epoch
    assert (numbers(first), first.w, first.start, first.complete) == ([0, 1, 2], 2, True, True)
    second = (await cluster.start([0, 2])).epoch
    assert (numbers(second), second.parent, second.number) == ([0, 2], first.id, 2)
    assert cluster.changes == [{0, 1, 2}, {0, 2}]


async def test_a_zone_that_is_put_out_and_one_that_comes_back() -> None:
    cluster = Cluster(3)
    membership = await cluster.start()
    await membership.exclude([1], "too slow")
    assert membership.in_service == {0, 2}
    (out,) = membership.epoch.out
    assert (out.number, out.reason, out.since) == (1, "too slow", membership.epoch.number)
    assert not membership.epoch.start
    await membership.exclude([1], "again")
    assert membership.version == 2, "nothing to do"
    await membership.admit(1)
    assert membership.in_service == {0, 1, 2}
    assert cluster.choose().epoch == membership.epoch


async def test_what_is_asked_for_together_is_one_epoch() -> None:
    cluster = Cluster(5)
    membership = await cluster.start()
    await asyncio.gather(membership.exclude([1], "a"), membership.exclude([3], "b"))
    assert cluster.changes == [{0, 1, 2, 3, 4}, {0, 2, 4}]


async def test_what_is_too_much_together_is_done_as_far_as_it_goes() -> None:
    """Two of three at once would leave one that can't speak for the two; one after the other can be told by it."""
    cluster = Cluster(3)
    membership = await cluster.start()
    await asyncio.gather(membership.exclude([1], "a"), membership.exclude([2], "b"))
    assert cluster.changes == [{0, 1, 2}, {0, 2}, {0}]


async def test_the_last_zone_stays() -> None:
    cluster = Cluster(1)
    membership = await cluster.start()
    with pytest.raises(Unavailable, match=r"too few zones are left: 0 .* \(/0: it burns\)"):
        await membership.exclude([0], "it burns")
    assert membership.in_service == {0}


async def test_too_few_are_no_epoch(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("can't be written to")
    cluster = Cluster(3)
    membership = await cluster.start()
    cluster.backends[1].fault = failing("put", times=9)
    with pytest.raises(Unavailable, match="too few zones are left: 1 where 2 of 3"):
        await membership.exclude([0], "a")
    assert membership.in_service == {0, 1, 2}
    assert cluster.changes == [{0, 1, 2}]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_member_that_fails_meanwhile_is_left_out_too(times: int, expected_warnings: ExpectedWarnings) -> None:
    """times: the first record reaches it and the mark doesn't, or not even that."""
    expected_warnings.allow("can't be written to")
    cluster = Cluster(5)
    membership = await cluster.start()
    fault = failing("put", times=1)
    puts = 0

    def later(call: str, name: str) -> None:
        nonlocal puts
        puts += call == "put"
        if puts >= times:
            fault(call, name)

    cluster.backends[1].fault = later
    await membership.exclude([0], "a")
    assert membership.in_service == {2, 3, 4}
    assert cluster.choose().epoch == membership.epoch
    assert cluster.choose([2, 4]).epoch == membership.epoch


async def test_a_member_that_hangs_is_not_waited_for_once_it_is_to_go() -> None:
    cluster = Cluster(5)
    membership = await cluster.start()
    cluster.executor.hold(1)
    first = asyncio.create_task(membership.exclude([0], "failed"))
    await turns()
    assert not first.done()
    await membership.exclude([1], "lags")
    await first
    assert membership.in_service == {2, 3, 4}
    cluster.executor.release(1)
    await turns()
    assert cluster.choose().epoch == membership.epoch, "what came late changes nothing"


@pytest.mark.parametrize("puts", [0, 1])
async def test_a_zone_that_hangs_while_it_comes_in_keeps_nobody_waiting(puts: int) -> None:
    """Nobody watches over it yet, and whatever else is asked for waits behind it. puts: of its two that return."""
    cluster = Cluster(4)
    cluster.answer_seconds = 0.05
    membership = await cluster.start()
    await membership.exclude([1], "failed")
    cluster.executor.hold(1)
    admission = asyncio.create_task(membership.admit(1))
    await turns()
    for _ in range(puts):
        cluster.executor.step(1)
    exclusion = asyncio.create_task(membership.exclude([0], "failed"))
    async with asyncio.timeout(5):
        await asyncio.gather(admission, exclusion)
    assert membership.in_service == {2, 3}
    assert [zone.reason for zone in membership.epoch.out] == ["failed", "it does not answer"]
    cluster.executor.release(1)
    await turns()
    assert cluster.choose().epoch == membership.epoch, "what came late changes nothing"


@pytest.mark.parametrize("puts", range(9))
@pytest.mark.parametrize("change", ["exclude", "admit", "start"])
async def test_a_death_between_any_two_records(puts: int, change: str) -> None:
    """The next opening finds the epoch before or the new one, and believes those who had all of what was flushed."""
    cluster = Cluster(4)
    membership = await cluster.start()
    if change == "admit":
        await membership.exclude([3], "out")
    before = membership.epoch
    calls = {"exclude": lambda: membership.exclude([0], "failed"), "admit": lambda: membership.admit(3)}
    cluster.die_after(puts)
    before_tasks = asyncio.all_tasks()
    task = asyncio.create_task(calls.get(change, cluster.start)())
    await turns()
    done = task.done()
    left = asyncio.all_tasks() - before_tasks
    for one in left:
        one.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    choice = cluster.choose()
    assert choice.epoch is not None
    assert before.id in {epoch.id for epoch in choice.chain}
    if done:
        assert choice.epoch == cluster.membership.epoch
    elif not choice.epoch.complete or choice.epoch == before:
        everybody = {member.id for member in before.members}
        assert History(choice.chain, choice.holders).current(before.id) == everybody
    cluster.die_after(1000)
    await cluster.start()
    assert numbers(cluster.membership.epoch) == [0, 1, 2, 3]
    assert cluster.choose().epoch == cluster.membership.epoch
