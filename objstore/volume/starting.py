"""Starting a store: which zones are there, which epoch counts, what the catalog says, a fresh epoch. FORMAT.md, "Zones
and epochs".

Zones may be missing, damaged, or long out of date. The epoch records decide whether those that are here are enough;
the fresh epoch names all that are here and can be written, before anything is changed. Zones that were out get new data
from then on; what they missed stays missing there until it is recovered, and nothing that they hold counts by itself.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from objstore.backend.absent import AbsentBackend
from objstore.backend.base import Backend, ZoneFailed
from objstore.clock import Clock
from objstore.errors import Corrupt, FormatError, InvalidRequest, NotFound, StoreError, Unavailable
from objstore.format.document import CatalogHead, Epoch, Known, Member, Outside
from objstore.log.env import Env
from objstore.log.trust import Trust
from objstore.replica.epochs import Choice, History, choose_epoch
from objstore.replica.members import (
    ZonePlace,
    check_one_store,
    drop_old_epochs,
    give_epochs,
    heal,
    initialise,
    lock_zones,
    look_at_zones,
    note_members,
    read_epochs,
    unfinished,
)
from objstore.replica.membership import Membership, Plan
from objstore.replica.zone import Executor, Zone, run
from objstore.units import GIB, format_size
from objstore.volume.catalog import Catalog
from objstore.volume.settings import StoreSettings

log = logging.getLogger(__name__)

NO_CATALOG: Final = CatalogHead(snapshot=0, generation=0, first_number=0, position=0, previous_crc=0)
LOSSES_USUAL: Final = 3


class Started(NamedTuple):
    """What a started store is made of. unclean: what the last stop may have cost. read_only: no epoch was written."""

    env: Env
    places: list[ZonePlace]
    membership: Membership
    catalog: Catalog
    unclean: str | None
    forced: bool
    read_only: bool


class Found(NamedTuple):
    """The zones of a store as they were found. places: usable ones. unusable: path -> why."""

    places: list[ZonePlace]
    unusable: dict[str, str]
    new: bool


def find_zones(
    backends: Sequence[tuple[Backend, str]],
    missing: Mapping[str, str],
    *,
    create: bool,
    lock_note: str,
    rng: random.Random,
    clock: Clock,
) -> Found:
    """Look at the zones given, lock them, and make a new store of empty ones where that was asked for."""
    places, unusable = look_at_zones(backends)
    unusable.update(missing)
    owned = [place for place in places if place.superblock is not None]
    empty = [place for place in places if place.superblock is None]
    if not owned and (unusable or not create):
        if unusable:
            raise Unavailable("; ".join(f"{path}: {reason}" for path, reason in unusable.items()))
        raise NotFound(f"{empty[0].path} is no zone of a store")
    if owned:
        check_one_store(owned)
    for place in list(owned):
        try:
            lock_zones([place], lock_note)
        except ZoneFailed as error:
            unusable[place.path] = str(error)
            owned.remove(place)
    if create and not unusable and (not owned or unfinished(owned)):
        # Nothing was ever stored; an initialisation that did not finish begins anew.
        if empty:
            lock_zones(empty, lock_note)
            places = initialise(places, rng, clock)
        return Found(places, unusable, True)
    if not owned:
        raise Unavailable("; ".join(f"{path}: {reason}" for path, reason in unusable.items()))
    known = {member.path for place in owned if place.superblock is not None for member in place.superblock.members}
    for place in empty:
        if place.path not in known:
            raise InvalidRequest(
                f"{place.path} is empty, but {owned[0].path} belongs to store "
                f"{owned[0].superblock.store[:8] if owned[0].superblock else ''}: give only the zones of one store"
            )
        unusable[place.path] = "it is empty"
    return Found(owned, unusable, False)


def choose(found: Found, *, force: bool) -> tuple[Choice, list[ZonePlace]]:
    """The epoch to open, and the zones that can be judged. Unavailable by name; Corrupt: nobody can say it."""
    held: dict[str, list[Epoch]] = {}
    damaged: dict[str, dict[int, FormatError]] = {}
    paths: dict[str, str] = {}
    places = []
    for place in found.places:
        assert place.superblock is not None
        zone = place.superblock.zone
        paths[zone] = place.path
        try:
            held[zone], damaged[zone] = read_epochs(place)
        except ZoneFailed as error:
            found.unusable[place.path] = str(error)
            continue
        places.append(place)
    for zone in heal(held, damaged):
        found.unusable[paths[zone]] = "its newest epoch record is damaged, and no other zone has it"
    places = [place for place in places if place.superblock is not None and place.superblock.zone in held]
    if not places:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in found.unusable.items())
        if found.unusable.keys() - {paths[zone] for zone in damaged}:
            raise Unavailable(f"no zone that is here has epoch records that can be read; {reasons}")
        raise Corrupt(f"no zone's epoch records can be read: {reasons}")
    try:
        choice = choose_epoch(held, force=force)
    except Unavailable as error:
        reasons = "".join(f"; {path}: {reason}" for path, reason in found.unusable.items())
        raise Unavailable(
            f"{error}{reasons}. Bring the missing zones back; --force opens what is here without them and gives up "
            "whatever only they hold"
        ) from error
    if choice.epoch is None:
        first = places[0].superblock
        assert first is not None
        absent = [known.path for known in first.members if known.id not in held]
        if absent:
            raise Unavailable(f"zones are missing: {', '.join(absent)}; a store is first opened with all of its zones")
    return choice, places


def known_places(choice: Choice, places: list[ZonePlace]) -> list[ZonePlace]:
    """Those of the zones that the store knows. One that was removed, or was added by a process that died meanwhile, is
    left alone."""
    if choice.epoch is None:
        return places
    everybody: list[Member | Outside] = [*choice.epoch.members, *choice.epoch.out]
    known = {zone.id for zone in everybody}
    kept = []
    for place in places:
        if place.superblock is not None and place.superblock.zone in known:
            kept.append(place)
        else:
            log.warning("%s is no zone of this store any more, or was never added to its end: left alone", place.path)
            place.backend.close()
    return kept


def plan_of(
    choice: Choice, places: Sequence[ZonePlace], unusable: Mapping[str, str], capacity: Mapping[str, float]
) -> Plan:
    """What the epoch of this start says: everybody who is here takes part."""
    here = {place.superblock.zone: place for place in places if place.superblock is not None}
    members: dict[int, Member] = {}
    out: dict[int, Outside] = {}
    epoch = choice.epoch
    if epoch is None:
        for zone_id, place in here.items():
            assert place.superblock is not None
            number = place.superblock.number
            members[number] = Member(number=number, id=zone_id, path=place.path, weight=capacity.get(zone_id, 1.0))
        return Plan(members, out, NO_CATALOG)
    known: list[Member | Outside] = [*epoch.members, *epoch.out]
    for zone in known:
        found = here.get(zone.id)
        if found is not None:
            members[zone.number] = Member(
                number=zone.number, id=zone.id, path=found.path, weight=zone.weight, state=zone.state
            )
        else:
            since, reason = (zone.since, zone.reason) if isinstance(zone, Outside) else (choice.highest + 1, "missing")
            out[zone.number] = Outside(
                number=zone.number,
                id=zone.id,
                path=zone.path,
                weight=zone.weight,
                state=zone.state,
                since=since,
                reason=unusable.get(zone.path, reason),
            )
    return Plan(members, out, epoch.catalog)


def make_zones(plan: Plan, places: Sequence[ZonePlace], count: int) -> list[Zone]:
    """Every zone number that was ever used (`count` at least), in order; those that are not here fail every call."""
    backends = {place.superblock.number: place.backend for place in places if place.superblock is not None}
    zones = []
    for number in range(max([count - 1, *plan.members, *plan.out]) + 1):
        known: Member | Outside | None = plan.members.get(number) or plan.out.get(number)
        if known is None:
            zones.append(Zone(number, bytes(16), AbsentBackend("", "it was removed"), f"{number} (removed)"))
        elif number in plan.members:
            zones.append(Zone(number, bytes.fromhex(known.id), backends[number], known.path))
        else:
            reason = plan.out[number].reason
            zone = Zone(number, bytes.fromhex(known.id), AbsentBackend(known.path, reason), known.path)
            zone.error = ZoneFailed(reason)
            zones.append(zone)
    return zones


def measure_capacity(places: Sequence[ZonePlace]) -> dict[str, float]:
    """Zone id -> its weight by default: GiB that it has or could take, at least 1."""
    weights = {}
    for place in places:
        assert place.superblock is not None
        capacity = place.backend.used_bytes() + place.backend.free_bytes()
        weights[place.superblock.zone] = max(1.0, float(capacity // GIB))
    return weights


async def start_store(
    backends: Sequence[tuple[Backend, str]],
    executor: Executor,
    *,
    settings: StoreSettings,
    create: bool,
    lock_note: str,
    clock: Clock,
    rng: random.Random,
    missing: Mapping[str, str],
    force: bool = False,
    read_only: bool = False,
) -> Started:
    """Start the store that these zones make up; see `open_zones`."""
    found = find_zones(backends, missing, create=create, lock_note=lock_note, rng=rng, clock=clock)
    choice, places = choose(found, force=force)
    places = known_places(choice, places)
    plan = plan_of(choice, places, found.unusable, measure_capacity(places) if choice.epoch is None else {})
    zones = make_zones(plan, places, choice.epoch.next_zone if choice.epoch is not None else 0)
    assert places[0].superblock is not None
    env = Env(
        store_id=bytes.fromhex(places[0].superblock.store),
        zones=zones,
        executor=executor,
        clock=clock,
        settings=settings,
        rng=rng,
    )
    env.in_service = frozenset(plan.members)
    history = History(choice.chain, choice.holders)
    membership = Membership(
        zones,
        executor,
        clock,
        rng,
        history=history,
        highest=choice.highest,
        answer_seconds=settings.zone_deadline_seconds,
    )
    membership.next_zone = len(zones)
    catalog = Catalog(env)
    trust = Trust(env, history if choice.epoch is not None else None)
    forced = force and not _openable(choice)
    await catalog.recover(plan.catalog, _committed_by(choice), trust, force=forced)
    unclean = _unclean_report(catalog, choice.epoch, env)
    if forced and choice.epoch is not None:
        names = ", ".join(zone.path for zone in plan.out.values()) or "none that is known"
        log.warning(
            "forced: what was flushed last may be on zones that are missing (%s); it is given up when they come back",
            names,
        )
    for dropped in choice.dropped:
        log.warning("epoch %d of %d zones is given up, as --force was used without them", dropped.number, dropped.w)
    started = Started(env, places, membership, catalog, unclean, force, read_only)
    if read_only:
        if choice.epoch is None:
            raise NotFound("the store was never opened: there is nothing in it")
        members, out = list(plan.members.values()), list(plan.out.values())
        membership.epoch = msgspec.structs.replace(choice.epoch, members=members, out=out)
        return started
    await _write_epoch(started, plan, choice, forced=forced)
    return started


def _openable(choice: Choice) -> bool:
    """Whether the epoch could have been opened without force."""
    epoch = choice.epoch
    if epoch is None:
        return True
    witnesses = sum(1 for member in epoch.members if epoch.id in choice.holders.get(member.id, ()))
    here = choice.holders.keys()
    return witnesses > len(epoch.members) - epoch.w and all(len(q.ids & here) >= q.least for q in choice.quorums)


async def _write_epoch(started: Started, plan: Plan, choice: Choice, *, forced: bool) -> None:
    """The fresh epoch, and the catalog that it names, on every zone that is here and takes them."""
    env, membership, catalog = started.env, started.membership, started.catalog
    copies = max((vdi.copies for vdi in catalog.state.vdis.values()), default=LOSSES_USUAL)
    least = env.settings.min_copies or copies - 1
    membership.losses = max(1, copies - least)
    head, failed = await catalog.persist()
    for number, error in failed.items():
        log.warning("%r failed and is left out: %s", env.zones[number], error)
        plan = membership.leave_out(plan, number, str(error))
    membership.on_change(lambda: _follow(env, membership))
    await membership.start(plan._replace(catalog=head), choice.epoch, choice.quorums, forced=forced)
    for number in plan.members.keys() - membership.in_service:
        env.zones[number].error = ZoneFailed("it failed while the store was opened")
    env.join(membership)
    await catalog.start(membership)
    await _tidy(started, choice)


def _follow(env: Env, membership: Membership) -> None:
    env.epoch, env.epoch_id = membership.epoch.number, bytes.fromhex(membership.epoch.id)


async def _tidy(started: Started, choice: Choice) -> None:
    """What nobody needs any more goes, and every superblock tells where the zones are."""
    env, membership = started.env, started.membership
    numbers = {epoch.id: epoch.number for epoch in choice.chain}
    heads = [numbers.get(head.epoch, 0) for head in started.catalog.state.heads.values() if not head.clean]
    oldest = min([membership.epoch.number, *heads])
    chain = {membership.epoch.id, *numbers}
    for number in sorted(membership.in_service):
        zone = env.zones[number]
        try:
            await run(env.executor, number, drop_old_epochs, zone.backend, oldest, chain)
            lacking = [e for e in membership.history.lacking(zone.zone_id.hex()) if e.number >= oldest]
            await run(env.executor, number, give_epochs, zone.backend, lacking)
        except StoreError as error:
            log.warning("epoch records are put in order by the next start: %s", error)
    everybody: list[Member | Outside] = [*membership.epoch.members, *membership.epoch.out]
    members = [Known(zone.number, zone.id, zone.path) for zone in sorted(everybody, key=lambda zone: zone.number)]
    note_members([p for p in started.places if p.superblock and p.superblock.number in membership.in_service], members)


def _committed_by(choice: Choice) -> str:
    """The epoch that committed the catalog's head, which later ones of its run repeat."""
    found = ""
    for epoch in choice.chain:
        if epoch.catalog != choice.chain[0].catalog:
            break
        found = epoch.id
    return found


def _unclean_report(catalog: Catalog, parent: Epoch | None, env: Env) -> str | None:
    """What the last stop may have cost. The memory that held it is gone, so only its limits are known."""
    if parent is None or catalog.state.clean:
        return None
    return (
        "the last stop was not clean: writes acknowledged but not flushed in the last "
        f"{env.settings.dirty_age_seconds:g} s before it may be lost, at most {format_size(env.dirty_bytes_max)}; "
        "nothing that was flushed"
    )
