"""What is damaged of a store's VDIs in every zone, kept in the catalog, so that a restart does not forget it.

A list is committed DELAY_SECONDS after it became another one, and before the store is closed: what a crash in between
loses is found again by the next read or scrub. It is only told: what can't be read is an error anyway, because every
read is verified, and a block that is written again or repaired drops out by itself.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from objstore.errors import StoreError
from objstore.format.catalog import DamagedRun, DamageEntry, LostPage
from objstore.log.blockmap import PageRef
from objstore.log.damage import Damage
from objstore.volume.catalog import Catalog

log = logging.getLogger(__name__)

DELAY_SECONDS: Final = 1.0
RUNS_MAX: Final = 4096
"""Runs of blocks that are kept for one VDI: an entry of 100 KiB."""


class DamageLists:
    """The damage of every log that has some. Touched by the event loop only."""

    def __init__(self, catalog: Catalog, loop: asyncio.AbstractEventLoop) -> None:
        self._catalog = catalog
        self._loop = loop
        self._lists: dict[int, Damage] = {}
        self._changed: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        for entry in catalog.state.damage.values():
            restore(self.of(entry.log), entry)
        self._stop_timer()
        self._changed.clear()

    def get(self, log_number: int) -> Damage | None:
        """The list of a log, if there is one."""
        return self._lists.get(log_number)

    def of(self, log_number: int) -> Damage:
        """The list of a log."""
        damage = self._lists.get(log_number)
        if damage is None:
            damage = self._lists[log_number] = Damage()
            damage.on_change = lambda: self._note(log_number)
        return damage

    def drop(self, log_number: int) -> None:
        """The VDI was deleted."""
        damage = self._lists.pop(log_number, None)
        if damage is not None:
            damage.on_change = lambda: None
        self._changed.discard(log_number)

    def _note(self, log_number: int) -> None:
        self._changed.add(log_number)
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(DELAY_SECONDS, self._begin)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self._timer = None
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self.save())
        else:
            self._timer = self._loop.call_later(DELAY_SECONDS, self._begin)

    async def save(self) -> None:
        """Commit what has become another list. What can't be committed is tried again with the next change."""
        changed, self._changed = self._changed, set()
        logs = {vdi.log for vdi in self._catalog.state.vdis.values()}
        for log_number in sorted(changed & self._lists.keys() & logs):
            entry = entry_of(log_number, self._lists[log_number])
            if entry == self._catalog.state.damage.get(log_number):
                continue
            if not (entry.runs or entry.pages or log_number in self._catalog.state.damage):
                continue
            try:
                await self._catalog.commit(entry)
            except StoreError as error:
                self._changed.add(log_number)
                log.warning("the list of damaged blocks is not kept yet log=%d: %s", log_number, error)
                return

    async def close(self) -> None:
        """Commit what is left, once nothing changes any more. Idempotent."""
        self._closed = True
        self._stop_timer()
        if self._task is not None:
            await asyncio.wait([self._task])
        await self.save()


def entry_of(log_number: int, damage: Damage) -> DamageEntry:
    """What the catalog keeps of it."""
    runs: list[DamagedRun] = []
    complete = not damage.truncated
    for block, entry in sorted(damage.blocks.items()):
        last = runs[-1] if runs else None
        if last is not None and (last.block + last.blocks, last.entry + last.blocks) == (block, entry):
            runs[-1] = DamagedRun(last.block, last.blocks + 1, last.entry)
        elif len(runs) < RUNS_MAX:
            runs.append(DamagedRun(block, 1, entry))
        else:
            complete = False
            break
    pages = [LostPage(region, *ref) for region, ref in sorted(damage.pages.items())]
    return DamageEntry(log=log_number, runs=runs, pages=pages[:RUNS_MAX], complete=complete and len(pages) <= RUNS_MAX)


def restore(damage: Damage, entry: DamageEntry) -> None:
    """Take over what the catalog has kept."""
    for run in entry.runs:
        for i in range(run.blocks):
            damage.note(run.block + i, run.entry + i)
    for page in entry.pages:
        damage.note_lost_page(page.region, PageRef(page.checkpoint, page.offset, page.length))
    damage.truncated = damage.truncated or not entry.complete
