"""Helps the log of an open VDI on that stands still, because its end can't become durable where it lies.

As soon as there are zones for it, the end is appended again there (log/takeover.py) and one head record in the catalog
makes that count. Where there are too few zones, or what was flushed is on zones that are out, the next change of zones
is waited for, however long that takes: what was acknowledged stays in memory.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from objstore.errors import StoreError
from objstore.log.disk import Disk
from objstore.log.env import Env
from objstore.log.takeover import Copied, copy_end, drop_former, give_up, take_over

log = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 1.0
"""Between attempts, if no zone comes or goes."""


class Standstill:
    """For one open disk. Touched by the event loop only; `_task` runs as long as the log stands still."""

    def __init__(
        self, env: Env, disk: Disk, commit: Callable[[Copied], Awaitable[bool]], gone_on: Callable[[], None]
    ) -> None:
        """commit: makes the copy count; False: nothing has happened. gone_on: told when the log has gone on."""
        self._env = env
        self._disk = disk
        self._commit = commit
        self._gone_on = gone_on
        self._wake = asyncio.Event()
        self._closed = False
        self._said = ""
        """Why it can't be helped on, as far as the journal knows."""
        self._task: asyncio.Task[None] | None = None
        disk.writer.on_standstill = self._stands_still

    def _stands_still(self) -> None:
        self._wake.set()
        if self._task is None and not self._closed:
            self._task = self._env.loop.create_task(self._run())
            self._disk.writer.watch(self._task)

    async def _run(self) -> None:
        writer = self._disk.writer
        while writer.waits_for_takeover and writer.error is None and not self._closed:
            self._wake.clear()
            if writer.has_zones():
                try:
                    await self._help()
                except StoreError as error:
                    if str(error) != self._said:
                        self._said = str(error)
                        log.warning("the end of the log can't be appended again yet log=%d: %s", self._disk.log, error)
                    writer.resume()
            if writer.waits_for_takeover:
                timer = self._env.loop.call_later(AGAIN_SECONDS, self._wake.set)
                await self._wake.wait()
                timer.cancel()
        self._said = ""
        self._task = None

    async def _help(self) -> None:
        env, disk = self._env, self._disk
        copied = await copy_end(disk)
        if copied is None:
            disk.writer.go_on()
            self._gone_on()
            return
        try:
            counts = await self._commit(copied)
        except StoreError as error:
            # It may count at the next opening, or not: nothing more may be built on either.
            disk.writer.fail(error)
            return
        if not counts:
            await give_up(env, copied.writer, copied.segments)
            disk.writer.resume()
            return
        take_over(disk, copied)
        self._gone_on()
        await drop_former(env, copied.former)

    async def close(self) -> None:
        """End after what is under way."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
