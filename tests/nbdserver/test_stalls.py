"""Who stands in the way when memory is short."""

from dataclasses import dataclass

from nbdserver.stalls import SLOW_BYTES_PER_SECOND, Stalls

STALL = 10.0


@dataclass(eq=False)
class Client:
    stalled_since: float | None = None
    moved_bytes: int = 0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(stalls: Stalls[Client], clock: Clock, client: Client, bytes_per_second: int, seconds: int) -> bool:
    """Let a client that we wait for move so many bytes each second; whether it is to go before the time is over."""
    for _ in range(seconds):
        if stalls.found([client], short=True, stall_seconds=STALL):
            return True
        clock.now += 1.0
        client.moved_bytes += bytes_per_second
        if bytes_per_second:
            client.stalled_since = clock.now
    return False


def test_who_moves_nothing_or_next_to_nothing_goes() -> None:
    for speed in (0, 1, SLOW_BYTES_PER_SECOND // 2):
        clock = Clock()
        assert watched(Stalls(clock), clock, Client(stalled_since=clock.now), speed, 13)


def test_who_moves_stays() -> None:
    clock = Clock()
    assert not watched(Stalls(clock), clock, Client(stalled_since=clock.now), 2 * SLOW_BYTES_PER_SECOND, 100)


def test_nobody_goes_while_nobody_waits() -> None:
    clock = Clock()
    stalls: Stalls[Client] = Stalls(clock)
    client = Client(stalled_since=clock.now)
    assert not watched(stalls, clock, client, 1, 9)
    assert not stalls.found([client], short=False, stall_seconds=STALL)
    assert not watched(stalls, clock, client, 1, 9), "the time counts from the new shortage on"


def test_who_is_not_waited_for_stays() -> None:
    clock = Clock()
    stalls: Stalls[Client] = Stalls(clock)
    client = Client()
    for _ in range(30):
        clock.now += 1.0
        assert not stalls.found([client], short=True, stall_seconds=STALL)
