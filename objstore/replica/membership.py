"""The epoch of an open store: who is in service, and how that changes. The rules are in epochs.py.

One change at a time; what is asked for meanwhile goes into the same one. A change is: the record put into every new
member, then put again, marked complete. A member that fails on the way is left out as well. Only then the change
counts, and whoever listens is told in the same loop turn. A crash in between leaves records that the next opening
either takes for complete or finds dead; nothing was acknowledged in them.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import msgspec

from objstore.clock import Clock
from objstore.errors import StoreError, Unavailable
from objstore.format.document import CatalogHead, Epoch, Member, Outside, encode_document
from objstore.replica.epochs import NO_EPOCH, History, Quorum, default_w, meets, quorums_of
from objstore.replica.zone import Executor, Zone, run

log = logging.getLogger(__name__)

EPOCH_FOLDER: Final = "epoch/"


def epoch_name(number: int) -> str:
    """Object name of an epoch record."""
    return f"{EPOCH_FOLDER}{number:08x}"


class Plan(NamedTuple):
    """What an epoch is to say: its members, and the known zones that are none, by zone number."""

    members: Mapping[int, Member]
    out: Mapping[int, Outside]
    catalog: CatalogHead


Edit: TypeAlias = Callable[[Plan], Plan]
"""A change asked for: a pure function. It is applied again, to a newer plan, when a member fails on the way."""


class Asked(NamedTuple):
    """An edit, the zones that it puts out, and who waits for it."""

    edit: Edit
    excludes: frozenset[int]
    future: "asyncio.Future[None]"


def without(plan: Plan, zones: Iterable[int], reason: str, since: int) -> Plan:
    """The plan with these members put out."""
    members, out = dict(plan.members), dict(plan.out)
    for number in zones:
        member = members.pop(number, None)
        if member is not None:
            out[number] = Outside(
                number=number,
                id=member.id,
                path=member.path,
                weight=member.weight,
                state=member.state,
                since=since,
                reason=reason,
            )
    return Plan(members, out, plan.catalog)


class Membership:
    """Owned by the event loop. `epoch` is in force: every member holds it, marked complete.

    in_service: numbers of its members. version: grows with each change. history: what epochs.History says of the past.
    next_zone: the lowest zone number that was never used. losses: zones that may fail at once without stopping
    everything (copies - min_copies): decides w.
    `_asked`: edits not yet in force, in order, each with the future of who asked; the task `_work` takes them.
    """

    def __init__(
        self,
        zones: Sequence[Zone],
        executor: Executor,
        clock: Clock,
        rng: random.Random,
        *,
        history: History,
        highest: int,
        losses: int = 1,
        answer_seconds: float = 5.0,
    ) -> None:
        """answer_seconds: so long a change waits for a zone that it takes in. Nobody watches over that one yet, and all
        other changes wait for this one."""
        self._zones = zones
        self._answer_seconds = answer_seconds
        self._executor = executor
        self._clock = clock
        self._rng = rng
        self.history = history
        self.losses = losses
        self.epoch: Epoch
        self.in_service: frozenset[int] = frozenset()
        self.version = 0
        self.next_zone = 0
        self._highest = highest
        self._listeners: list[Callable[[], None]] = []
        self._asked: list[Asked] = []
        self._poked = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    # -- what there is ------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What the epoch in force says."""
        epoch = self.epoch
        return Plan({m.number: m for m in epoch.members}, {o.number: o for o in epoch.out}, epoch.catalog)

    def leave_out(self, plan: Plan, number: int, reason: str) -> Plan:
        """The plan without a member, for the next epoch."""
        return without(plan, [number], reason, self._highest + 1)

    def placeable(self) -> list[Member]:
        """Members that new segments may go to."""
        return [member for member in self.epoch.members if member.state == "in"]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the loop turn in which a new epoch comes into force, after `in_service` has changed."""
        self._listeners.append(listener)

    # -- changing it --------------------------------------------------------------------------------------------

    async def start(self, plan: Plan, parent: Epoch | None, quorums: Sequence[Quorum], *, forced: bool = False) -> None:
        """Write the epoch of this start. Unavailable: too many zones fail meanwhile."""
        await self._write(plan, parent, list(quorums), start=True, forced=forced)

    async def exclude(self, zones: Iterable[int], reason: str) -> None:
        """Go on without these zones; on return that is durable. Zones that are out already are no error.
        Unavailable: too few would remain; they stay members, nothing has changed."""
        gone = frozenset(zones)
        await self._ask(lambda plan: without(plan, gone, reason, self._highest + 1), gone)

    async def admit(self, number: int) -> None:
        """Take a zone that is out into service again. The caller knows that no call to it is outstanding, and looks
        whether it is in service then: if it fails on the way it stays out."""

        def edit(plan: Plan) -> Plan:
            members, out = dict(plan.members), dict(plan.out)
            former = out.pop(number, None)
            if former is not None:
                path = self._zones[number].path
                members[number] = Member(
                    number=number, id=former.id, path=path, weight=former.weight, state=former.state
                )
            return Plan(members, out, plan.catalog)

        await self._ask(edit)

    async def change(self, edit: Edit) -> None:
        """Any other change: a pure function of the plan."""
        await self._ask(edit)

    async def set_catalog(self, catalog: CatalogHead) -> None:
        """Commit a new head of the catalog."""
        await self._ask(lambda plan: plan._replace(catalog=catalog))

    async def _ask(self, edit: Edit, excludes: frozenset[int] = frozenset()) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(Asked(edit, excludes, future))
        self._poked.set()
        if self._work is None:
            self._work = asyncio.get_running_loop().create_task(self._serve())
        await future

    async def _serve(self) -> None:
        """Bring into force what is asked for, until nothing is. What can't be done together is tried one by one."""
        together = True
        try:
            while self._asked:
                await asyncio.sleep(0)
                taken = list(self._asked if together else self._asked[:1])
                try:
                    await self._write(None, self.epoch, list(quorums_of((self.epoch,))), taken=taken)
                except StoreError as error:
                    if len(taken) > 1:
                        together = False
                        continue
                    self._done(taken, error)
                else:
                    self._done(taken, None)
                together = True
        finally:
            self._work = None
            self._done(list(self._asked), Unavailable("the membership is no longer kept"))

    async def _write(
        self,
        plan: Plan | None,
        parent: Epoch | None,
        quorums: list[Quorum],
        *,
        taken: list[Asked] | None = None,
        start: bool = False,
        forced: bool = False,
    ) -> None:
        """Write records until one is complete on all its members. plan: None = what is in force, changed by `taken`."""
        failed: dict[int, str] = {}
        before = parent
        while True:
            wanted = self.plan if plan is None else plan
            for edit, _, _ in taken or ():
                wanted = edit(wanted)
            for number, reason in failed.items():
                wanted = without(wanted, [number], reason, self._highest + 1)
            if plan is None and parent is before and wanted == self.plan:
                return
            self._highest += 1
            epoch = self._record(wanted, parent, start=start, forced=forced)
            if not epoch.members or not (forced or meets(epoch.members, quorums)):
                raise Unavailable(_too_few(wanted, quorums))
            failed |= await self._put(epoch)
            if failed.keys() & wanted.members.keys():
                continue
            quorums = [*quorums_of((epoch,)), *quorums]  # all of its members have it
            parent = epoch
            marked = msgspec.structs.replace(epoch, complete=True)
            failed |= await self._put(marked)
            if failed.keys() & wanted.members.keys():
                continue
            self._in_force(marked)
            return

    def _record(self, plan: Plan, parent: Epoch | None, *, start: bool, forced: bool) -> Epoch:
        self.next_zone = max(self.next_zone, *(number + 1 for number in (*plan.members, *plan.out, -1)))
        return Epoch(
            number=self._highest,
            id=self._rng.randbytes(16).hex(),
            parent=parent.id if parent is not None else NO_EPOCH,
            members=[plan.members[number] for number in sorted(plan.members)],
            out=[plan.out[number] for number in sorted(plan.out)],
            w=default_w(len(plan.members), self.losses),
            wall=self._clock.wall(),
            start=start,
            catalog=plan.catalog,
            next_zone=self.next_zone,
            forced=forced,
        )

    async def _put(self, epoch: Epoch) -> dict[int, str]:
        """Put the record into all its members at once: who failed, and why. A member whose exclusion is asked for
        meanwhile is not waited for, and one that is to come in not for long: its call may never return."""
        data = encode_document("epoch", epoch)
        name = epoch_name(epoch.number)
        loop = asyncio.get_running_loop()
        calls = {
            loop.create_task(run(self._executor, m.number, self._zones[m.number].backend.put, name, data)): m.number
            for m in epoch.members
        }
        failed: dict[int, str] = {}
        waiting = set(calls)
        # At a start everybody comes in, and nobody can be told from a host that is slow.
        coming = frozenset(calls.values()) - self.in_service if self.in_service else frozenset()
        limit = loop.time() + self._answer_seconds
        while waiting:
            poked = loop.create_task(self._poked.wait())
            left = limit - loop.time() if any(calls[task] in coming for task in waiting) else None
            try:
                await asyncio.wait([*waiting, poked], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                poked.cancel()
            self._poked.clear()
            for task in [task for task in waiting if task.done()]:
                waiting.discard(task)
                error = task.exception()
                if error is not None:
                    failed[calls[task]] = str(error)
                    log.warning("epoch %d can't be written to %r: %s", epoch.number, self._zones[calls[task]], error)
            unwanted = frozenset[int]().union(*(asked.excludes for asked in self._asked))
            if loop.time() >= limit:
                unwanted |= coming
            for task in [task for task in waiting if calls[task] in unwanted]:
                waiting.discard(task)
                task.add_done_callback(_noted)
                failed[calls[task]] = "it does not answer"
        return failed

    def _in_force(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.history.add(epoch)
        self.version += 1
        self.in_service = frozenset(member.number for member in epoch.members)
        for listener in self._listeners:
            listener()

    def _done(self, taken: Sequence[Asked], error: StoreError | None) -> None:
        for asked in taken:
            self._asked.remove(asked)
            if asked.future.done():
                continue
            if error is None:
                asked.future.set_result(None)
            else:
                asked.future.set_exception(error)

    async def settled(self) -> None:
        """Wait until no change is under way."""
        while self._work is not None:
            await asyncio.wait([self._work])


def _too_few(plan: Plan, quorums: Iterable[Quorum]) -> str:
    ids = {member.id for member in plan.members.values()}
    least, of = next(((q.least, len(q.ids)) for q in quorums if len(q.ids & ids) < q.least), (1, 1))
    out = ", ".join(f"{zone.path}: {zone.reason}" for zone in plan.out.values())
    return f"too few zones are left: {len(ids)} where {least} of {of} are needed ({out or 'none is out'})"


def _noted(task: "asyncio.Task[None]") -> None:
    """A call that nobody waits for any more has returned."""
    if not task.cancelled():
        task.exception()
