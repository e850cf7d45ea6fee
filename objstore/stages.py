"""Where a request's time goes: the stages that it waits in, noted for whoever asked for that.

A caller that wants to know makes Stages and `follow`s them in its task; `stage("...")` around an await then notes how
long that took. Nobody asks, nothing is noted. Tasks that a request starts inherit its context and note nothing of use,
so stages stand only in what the request's own task runs.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal


class Stages:
    """Seconds by stage, of one request. clock: monotonic seconds."""

    __slots__ = ("clock", "seconds")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}


_followed: ContextVar[Stages | None] = ContextVar("stages", default=None)


def follow(stages: Stages) -> None:
    """Note the stages of what this task does from now on."""
    _followed.set(stages)


class stage:
    """`with stage("sync"): await ...`: so long in that stage, added to what is noted of it already."""

    __slots__ = ("_began", "_name", "_stages")

    def __init__(self, name: str) -> None:
        self._name = name
        self._stages = _followed.get()

    def __enter__(self) -> None:
        if self._stages is not None:
            self._began = self._stages.clock()

    def __exit__(self, *_error: object) -> None:
        stages = self._stages
        if stages is not None:
            took = stages.clock() - self._began
            stages.seconds[self._name] = stages.seconds.get(self._name, 0.0) + took


class StagedLock(asyncio.Lock):
    """A lock that notes how long it was waited for, as a stage of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    async def acquire(self) -> Literal[True]:
        """See asyncio.Lock."""
        with stage(self._name):
            return await super().acquire()
