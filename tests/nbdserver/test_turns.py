"""Shares of the event loop: in the ratio of the weights, whatever the number of connections; nothing stays unused."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from nbdserver.turns import Turns
from tests.nbdserver.volumes import TestVolume


class Clock:
    """Time that passes only when work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Client:
    """A connection whose requests take `cost` seconds. busy: whether it has another one after each turn."""

    def __init__(
        self, turns: Turns, clock: Clock, volume: TestVolume, cost: float, done: Counter[str], *, tasks: int = 0
    ) -> None:
        self.turns, self.clock, self.cost, self.done, self.tasks = turns, clock, cost, done, tasks
        self.volume = volume
        self.share = turns.enter(volume)
        self.busy = True
        self.on_turn: Callable[[], None] = lambda: None

    def take_turn(self) -> int:
        self.clock.now += self.cost
        self.done[self.volume.name] += 1
        self.on_turn()
        if self.busy:
            self.turns.queue(self.share, self)
        return self.tasks


async def _work(clients: list[Client], clock: Clock, seconds: float) -> None:
    """Let them work for so long by the clock."""
    end = clock.now + seconds
    for client in clients:
        client.busy = True
        client.turns.queue(client.share, client)
    while clock.now < end:
        before = clock.now
        await asyncio.sleep(0)
        assert clock.now > before, "somebody always works"
    for client in clients:
        client.busy = False
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("weights", "connections", "costs"),
    [
        ((100, 100), (1, 1), (1e-4, 1e-4)),
        ((100, 100), (1, 8), (1e-4, 1e-4)),
        ((300, 100), (1, 8), (1e-4, 1e-4)),
        ((100, 100), (1, 8), (1e-5, 7e-4)),
        ((100, 1000), (4, 1), (3e-5, 2e-4)),
    ],
)
async def test_time_is_shared_by_weight(
    weights: tuple[int, int], connections: tuple[int, int], costs: tuple[float, float]
) -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    clients = []
    for name, weight, count, cost in zip("ab", weights, connections, costs, strict=True):
        volume = TestVolume(name=name)
        volume.weight = weight
        clients += [Client(turns, clock, volume, cost, done) for _ in range(count)]
    await _work(clients, clock, 10)
    used = [done[name] * cost for name, cost in zip("ab", costs, strict=True)]
    assert used[0] / used[1] == pytest.approx(weights[0] / weights[1], rel=0.02)


async def test_what_a_request_costs_besides_its_turn_counts() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    light = Client(turns, clock, TestVolume(name="a"), 1e-4, done)
    heavy = Client(turns, clock, TestVolume(name="b"), 1e-4, done, tasks=6)
    await _work([light, heavy], clock, 10)
    assert done["a"] / done["b"] == pytest.approx(4, rel=0.05)


async def test_nobody_saves_up_what_he_did_not_want() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    ours, theirs = (Client(turns, clock, TestVolume(name=name), 1e-4, done) for name in "ab")
    await _work([theirs], clock, 5)
    assert done["b"] == pytest.approx(50_000, rel=0.01), "what others leave is theirs"
    done.clear()
    await _work([ours, theirs], clock, 1)
    assert done["a"] == pytest.approx(done["b"], rel=0.02)


async def test_a_request_now_and_then_is_served_at_once() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    hammer = [Client(turns, clock, TestVolume(name="b"), 1e-4, done)]
    hammer += [Client(turns, clock, hammer[0].volume, 1e-4, done) for _ in range(20)]
    rare = Client(turns, clock, TestVolume(name="a"), 1e-5, done)
    rare.busy = False
    waited = []

    def sometimes() -> None:
        if done["b"] % 100 == 0:
            asked = clock.now
            rare.on_turn = lambda: waited.append(clock.now - asked)
            turns.queue(rare.share, rare)

    for client in hammer:
        client.on_turn = sometimes
    await _work(hammer, clock, 10)
    assert len(waited) > 900
    assert max(waited) < 3e-4, "not behind the twenty others"


async def test_connections_of_a_volume_take_turns() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    volume = TestVolume(name="a")
    order: list[int] = []
    clients = [Client(turns, clock, volume, 1e-4, done) for _ in range(5)]
    for number, client in enumerate(clients):
        client.on_turn = lambda number=number: order.append(number)  # type: ignore[misc]
    other = Client(turns, clock, TestVolume(name="b"), 1e-4, done)
    await _work([*clients, other], clock, 1)
    assert order[: len(order) // 5 * 5] == list(range(5)) * (len(order) // 5)


async def test_who_leaves_is_not_served_and_frees_the_share() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    ours, theirs = (Client(turns, clock, TestVolume(name=name), 1e-4, done) for name in "ab")
    ours.busy = theirs.busy = False
    turns.queue(ours.share, ours)
    turns.queue(theirs.share, theirs)
    turns.leave(ours.share, ours)
    await asyncio.sleep(0)
    assert done == {"b": 1}
    clock.now += 1
    assert not turns.contended(theirs.share)
    clock.now += 1e-6
    assert not turns.contended(theirs.share), "it is alone"


async def test_an_idle_neighbour_costs_nothing() -> None:
    """Whoever is the only one active is served at once, and may be polled for its next request."""
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    ours, theirs = (Client(turns, clock, TestVolume(name=name), 1e-4, done) for name in "ab")
    turns.contended(theirs.share)
    assert turns.contended(ours.share), "the other one was served just now"
    for _ in range(1000):
        clock.now += 1e-4
        turns.contended(ours.share)
    assert not turns.contended(ours.share)
    assert turns.contended(theirs.share)
    assert turns.contended(ours.share)


async def test_a_turn_that_fails_takes_nobody_elses() -> None:
    clock = Clock()
    turns, done = Turns(clock), Counter[str]()
    ours, theirs = (Client(turns, clock, TestVolume(name=name), 1e-4, done) for name in "ab")
    ours.busy = theirs.busy = False

    def fail() -> None:
        raise ZeroDivisionError

    ours.on_turn = fail
    met: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: met.append(context.get("exception")))
    turns.queue(ours.share, ours)
    turns.queue(theirs.share, theirs)
    for _ in range(3):
        await asyncio.sleep(0)
    assert [type(error) for error in met] == [ZeroDivisionError]
    assert done == {"a": 1, "b": 1}
    turns.queue(theirs.share, theirs)
    await asyncio.sleep(0)
    assert done["b"] == 2
