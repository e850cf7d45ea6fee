"""A membership whose every change waits for the test, or is refused."""

import asyncio
from collections.abc import Callable, Iterable

from objstore.errors import Unavailable
from objstore.log.env import Env


class HandMembership:
    """Env's Membership. held: changes wait for `release`. refuse: they fail. asked: what was asked for, in order."""

    def __init__(self, zones: Iterable[int], *, held: bool = False) -> None:
        self.in_service = frozenset(zones)
        self.refuse = False
        self.asked: list[frozenset[int]] = []
        self._open = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        if not held:
            self._open.set()

    async def exclude(self, zones: Iterable[int], reason: str) -> None:
        gone = frozenset(zones)
        self.asked.append(gone)
        await self._open.wait()
        if self.refuse:
            raise Unavailable("too few zones would remain")
        self._change(self.in_service - gone)

    def admit(self, zone: int) -> None:
        self._change(self.in_service | {zone})

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        """Changes come into force."""
        self._open.set()

    def _change(self, now: frozenset[int]) -> None:
        if now != self.in_service:
            self.in_service = now
            for listener in self._listeners:
                listener()


def join(env: Env, *, held: bool = False) -> HandMembership:
    """Let an Env follow a membership of all its zones. Its watch ticks only by hand."""
    membership = HandMembership(env.in_service, held=held)
    env.join(membership)
    assert env.watch is not None
    env.watch.close()
    return membership
