"""Whose requests are next when clients of several volumes have some: start-time fair queueing of the event loop's time.

Every volume has a share of the loop in the ratio of the weights, as long as its clients have requests; what they leave
is the others'. Its virtual time goes on with the time that its requests take, divided by its weight; the volume that is
least far goes next, and one whose clients were idle begins where the others are, so nothing is saved up. The
connections of a volume take turns. With one volume in use nothing of this is done.

Source: Goyal, Vin, Cheng: Start-time Fair Queuing, SIGCOMM 1996 (virtual time = start tag of what is being served).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from objstore.volume.base import Volume

RUN_SECONDS: Final = 0.001
"""After so long whoever else waits for the event loop gets it, and newcomers join the queue."""
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

    @property
    def crowded(self) -> bool:
        """Several volumes are in use: who has something to read has to `queue`."""
        return len(self._shares) > 1

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
        """Give turns until nobody waits or others have to get the loop."""
        end = self._clock() + RUN_SECONDS
        while waiting := [share for share in self._shares.values() if share.ready]:
            began = self._clock()
            if began > end:
                asyncio.get_running_loop().call_soon(self._run)
                return
            share = min(waiting, key=_virtual)
            self._virtual = share.virtual
            turn = next(iter(share.ready))
            del share.ready[turn]
            tasks = turn.take_turn()
            share.virtual += (self._clock() - began + tasks * TASK_SECONDS) / share.volume.weight
        self._running = False


def _virtual(share: Share) -> float:
    return share.virtual
