"""Deliberate bugs in what happens when zones come, go and come back (see bugs.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

import objstore.log.shelves
import objstore.volume.starting
from objstore.format.document import Epoch
from objstore.log.env import Env
from objstore.log.segment import Segment
from objstore.log.shelves import Shelves
from objstore.replica.membership import Membership, Plan, without
from objstore.volume.recovery import Recovery
from tests.sim.bugs_writing import nothing, patch
from tests.support.sim_executor import SimExecutor

_choose = objstore.volume.starting.choose_epoch
_start = Membership.start
_replace_copy = objstore.log.shelves.replace_copy


def _by_number(held: Any, *, force: bool = False) -> Any:
    """The epoch of the highest number that anybody here has is opened, whoever is missing."""
    return _choose(held, force=True)


async def _no_new_epoch(self: Membership, plan: Plan, parent: Epoch | None, *args: Any, **options: Any) -> None:
    """A start goes on in the epoch that it finds, if the same zones are there."""
    if parent is None or {m.number for m in parent.members} != plan.members.keys():
        await _start(self, plan, parent, *args, **options)
        return
    self._highest = max(self._highest, parent.number)
    self._in_force(msgspec.structs.replace(parent, complete=True, catalog=plan.catalog))


async def _out_at_once(self: Membership, zones: Iterable[int], reason: str) -> None:
    """A zone that failed is left out without an epoch that says so."""
    plan = without(self.plan, zones, reason, self._highest + 1)
    if plan.members.keys() != self.plan.members.keys():
        record = self._record(plan, self.epoch, start=False, forced=False)
        self._in_force(msgspec.structs.replace(record, complete=True))


def _back_at_once(self: SimExecutor, zone: int) -> None:
    """A zone is taken back while calls from before it was put out have not returned."""
    self._out.pop(zone, None)
    self._admitted[zone] += 1


async def _counted_early(env: Env, segment: Segment, zone: int, image: memoryview) -> bool:
    """A copy counts before it is durable."""
    env.loop.create_task(_replace_copy(env, segment, zone, memoryview(bytes(image))))
    return True


async def _all_is_well(self: Recovery) -> bool:
    """Whatever zones missed, the store takes them for complete at its start."""
    return True


ZONES: Final = {
    "epochs-by-number": [patch(objstore.volume.starting, "choose_epoch", _by_number)],
    "no-new-epoch": [patch(Membership, "start", _no_new_epoch)],
    "out-without-epoch": [patch(Membership, "exclude", _out_at_once)],
    "back-with-calls-outstanding": [patch(SimExecutor, "readmit", _back_at_once)],
    "copy-counted-early": [patch(objstore.log.shelves, "replace_copy", _counted_early)],
    "orphan-kept": [patch(Shelves, "_remove", nothing)],
    "return-not-recovered": [patch(Recovery, "_all_was_well", _all_is_well)],
}
