"""Memory of all block maps of a store: the account, who is asked for relief, who waits for it.

Two parts of it count: what is loaded, which eviction brings back below the limit, and of that what is pinned, because
it was changed and no checkpoint has it yet. At half of the limit pinned memory makes checkpoints due; at the limit
whoever would pin more waits for one (`room`), so what one request pins is all that can come on top for each disk.

Regions below EVICTION_BYTES_MIN don't count: the place of a page that would stand for them takes as much.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from objstore.errors import NoSpace, StoreError
from objstore.units import KIB

PINNED_BYTES_MIN: Final = 256 * KIB
"""So much may be pinned whatever the limit: checkpoints for less would cost more than they free."""


class MapOwner(Protocol):
    """A disk's keeper, as the account sees it."""

    gave_up: bool

    @property
    def pinned_bytes(self) -> int:
        """What its map pins."""
        ...

    @property
    def error(self) -> StoreError | None:
        """Why its log takes nothing more."""
        ...

    @property
    def stuck(self) -> StoreError | None:
        """Why no checkpoint of its can come, once that has lasted as long as a write waits."""
        ...

    def evict(self, excess_bytes: int) -> None:
        """Let clean regions go."""
        ...

    def relieve(self) -> None:
        """See that a checkpoint comes."""
        ...


class MapMemory:
    """The account. Touched by the event loop only; maps keep loaded_bytes and pinned_bytes up to date."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.pinned_bytes_max = max(limit_bytes, PINNED_BYTES_MIN)
        self.loaded_bytes = 0
        self.pinned_bytes = 0
        self.owners: list[MapOwner] = []
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def waiting(self) -> int:
        """Requests that wait in `room`."""
        return len(self._waiters)

    def due(self, pinned_bytes: int) -> bool:
        """Whether a map that pins so much shall have a checkpoint: memory is short, and it pins no less than others."""
        return self.pinned_bytes * 2 >= self.pinned_bytes_max and pinned_bytes * len(self.owners) >= self.pinned_bytes

    def evict(self, first: MapOwner) -> None:
        """Bring the loaded regions back below the limit, if clean ones can go: those of `first` first."""
        for owner in (first, *self.owners):
            excess_bytes = self.loaded_bytes - self.limit_bytes
            if excess_bytes <= 0:
                return
            owner.evict(excess_bytes)

    async def room(self, grows: Callable[[], bool]) -> None:
        """Wait while pinned memory stands at its limit and `grows` says that the caller would pin more.

        NoSpace: the zones have no room for the checkpoint that would free memory; Unavailable: too few are there.
        """
        while self.pinned_bytes >= self.pinned_bytes_max and grows():
            owner = max((o for o in self.owners if o.error is None), key=lambda o: o.pinned_bytes, default=None)
            if owner is None:
                return
            owner.relieve()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)
            if owner.gave_up and self.pinned_bytes >= self.pinned_bytes_max:
                raise NoSpace("the zones have no room for the checkpoint that changed map regions wait for")
            if owner.stuck is not None and self.pinned_bytes >= self.pinned_bytes_max:
                raise owner.stuck

    def wake(self) -> None:
        """Let everyone look again: a checkpoint has ended, or a log."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
