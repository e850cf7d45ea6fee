"""Whose requests are next when clients of several volumes have some: start-time fair queueing of the event loop's time.

Every volume has a share of the loop in the ratio of the weights, as long as its clients have requests; what they leave
is the others'. Its virtual time goes on with the time that its requests take, divided by its weight; the volume that is
least far goes next, and one whose clients were idle begins where the others are, so nothing is saved up. The
connections of a volume take turns. As long as the clients of one volume only have requests nothing of this is done.

Source: Goyal, Vin, Cheng: Start-time Fair Queuing, SIGCOMM 1996 (virtual time = start tag of what is being served).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from objstore.volume.base import Volume

RUN_SECONDS: Final = 0.001
"""After so long whoever else waits for the event loop gets it, and newcomers join the queue."""
CONTENDED_SECONDS: Final = 0.01
"""So long after clients of another volume had requests they are expected to have more."""
TASK_SECONDS: Final = 50e-6
"""What a request that could not be answered at once costs the loop besides its turn: a task, a thread's answer."""


class Turn(Protocol):
    """A connection."""

    def take_turn(self) -> int:
        """Receive and answer once; how many requests have become tasks."""
        ...


class Share:
    """One volume in use. virtual: seconds of the loop's time over its weight, from which it is to be served next."""

    __slots__ = ("ready", "users", "virtual", "volume")

    def __init__(self, volume: Volume, virtual: float) -> None:
        self.volume = volume
        self.virtual = virtual
        self.users = 0
        self.ready: dict[Turn, None] = {}
        """Connections with something to read, the one whose turn it is first."""


class Turns:
    """The shares of all volumes in use. Touched by the event loop only. clock: seconds, for what requests take."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._shares: dict[Volume, Share] = {}
        self._virtual = 0.0
        """Where the share is that was served last."""
        self._running = False
        self._last: Share | None = None
        """Whose clients had a request last, and since when none of others had."""
        self._alone_since = 0.0

    def contended(self, share: Share) -> bool:
        """A client of this volume has something to read: whether it has to `queue`, because clients of others have had
        something as well just now."""
        if len(self._shares) < 2:
            return False
        now = self._clock()
        if share is not self._last:
            self._last = share
            self._alone_since = now
        return now - self._alone_since < CONTENDED_SECONDS

    def enter(self, volume: Volume) -> Share:
        """A connection begins to use a volume; `leave` follows."""
        share = self._shares.get(volume)
        if share is None:
            share = self._shares[volume] = Share(volume, self._virtual)
        share.users += 1
        return share

    def leave(self, share: Share, turn: Turn) -> None:
        """The connection does not use it any more."""
        share.ready.pop(turn, None)
        share.users -= 1
        if not share.users:
            del self._shares[share.volume]
            if self._last is share:
                self._last = None

    def queue(self, share: Share, turn: Turn) -> None:
        """The connection wants a turn, once, however often it says so."""
        if turn in share.ready:
            return
        if not share.ready:
            share.virtual = max(share.virtual, self._virtual)
        share.ready[turn] = None
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_soon(self._run)

    def charge(self, share: Share, seconds: float) -> None:
        """Something was done for it out of turn."""
        share.virtual = max(share.virtual, self._virtual) + seconds / share.volume.weight

    def _run(self) -> None:
        """Give turns until nobody waits or others have to get the loop; one that fails takes nobody else's."""
        try:
            self._give_turns()
        finally:
            self._running = any(share.ready for share in self._shares.values())
            if self._running:
                asyncio.get_running_loop().call_soon(self._run)

    def _give_turns(self) -> None:
        end = self._clock() + RUN_SECONDS
        while waiting := [share for share in self._shares.values() if share.ready]:
            began = self._clock()
            if began > end:
                return
            share = min(waiting, key=_virtual)
            self._virtual = share.virtual
            turn = next(iter(share.ready))
            del share.ready[turn]
            tasks = turn.take_turn()
            share.virtual += (self._clock() - began + tasks * TASK_SECONDS) / share.volume.weight


def _virtual(share: Share) -> float:
    return share.virtual
