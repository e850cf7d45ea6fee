"""The status of a store as a whole: its health with the reasons, and what its zones say about their space."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from objstore.backend.base import Backend
from objstore.errors import StoreError
from objstore.format.document import FORMAT_VERSION, Epoch, Member, Outside
from objstore.log.env import Env
from objstore.replica.membership import Membership
from objstore.replica.zone import run_long
from objstore.units import BLOCK_SHIFT
from objstore.version import VERSION
from objstore.volume.catalog import Catalog
from objstore.volume.recovery import Recovery
from objstore.volume.scrub import Scrub
from objstore.volume.status import RecoveryStatus, ScrubStatus, StoreStatus, VdiStatus, ZoneStatus
from objstore.volume.vdi import Vdi


class SummarizedStore(Protocol):
    """What the status needs of the store."""

    env: Env
    catalog: Catalog
    membership: Membership
    scrub: Scrub
    recovery: Recovery
    started: float
    unclean_stop: str | None

    def vdis(self) -> list[VdiStatus]: ...
    def open_vdis(self) -> list[Vdi]: ...


async def store_status(store: SummarizedStore, *, thorough: bool = True) -> StoreStatus:
    """The store as a whole; the zones are asked for their space outside the event loop. thorough: false = without what
    takes long in a large store: that space, and counting segments that have too few copies."""
    env = store.env
    epoch = store.membership.epoch
    vdis = store.vdis()
    scrub = store.scrub.status()
    recovery = store.recovery.status()
    reasons = [f"VDI {vdi.name}: {vdi.reason}" for vdi in vdis if vdi.state == "failed"]
    if store.catalog.error is not None:
        reasons.append(f"catalog: {store.catalog.error}")
    failing = {zone.index for zone in env.zones if zone.error is not None}
    stopped = bool(reasons) or not failing.isdisjoint(env.in_service)
    reasons += _zone_reasons(env, epoch)
    fewer = _fewer_copies(env, store.open_vdis()) if thorough else []
    reasons += [text for text, _ in fewer]
    if env.rebuilt_pages:
        reasons.append(f"{env.rebuilt_pages} map pages were damaged in every copy and made again from the log")
    reasons += _copy_reasons(vdis, scrub, recovery)
    zones = [
        *(await asyncio.gather(*(_member_status(store, member, thorough) for member in epoch.members))),
        *(_out_status(env, zone) for zone in epoch.out),
    ]
    zones.sort(key=lambda zone: zone.number)
    return StoreStatus(
        store_id=env.store_id.hex(),
        format_version=FORMAT_VERSION,
        health="stopped" if stopped else "degraded" if reasons else "ok",
        reasons=reasons,
        zones=zones,
        epoch=epoch.number,
        vdis=len(store.catalog.state.names),
        dirty_bytes=env.dirty_bytes,
        dirty_bytes_max=env.dirty_bytes_max,
        map_bytes=env.maps.loaded_bytes,
        map_bytes_max=env.maps.limit_bytes,
        map_waiting=env.maps.waiting,
        unclean_stop=store.unclean_stop,
        started=store.started,
        version=VERSION,
        scrub=scrub,
        recovery=recovery,
        under_replicated=sum(count for _, count in fewer),
        rebuilt_pages=env.rebuilt_pages,
        bad_copies=env.bad_copies,
        moved_bytes=env.moved_blocks << BLOCK_SHIFT,
        freed_segments=env.freed_segments,
        loaded_map_pages=env.loaded_pages,
        crowded_vdis=sum(vdi.collector.tight for vdi in store.open_vdis()),
        last_flushes={vdi.name: vdi.last_flush for vdi in store.open_vdis()},
    )


def _zone_reasons(env: Env, epoch: Epoch) -> list[str]:
    reasons = [
        f"{zone!r}: {zone.error}" for zone in env.zones if zone.error is not None and zone.index in env.in_service
    ]
    reasons += [f"zone {zone.path} is out since epoch {zone.since}: {zone.reason}" for zone in epoch.out]
    late = env.watch.late if env.watch is not None else ()
    reasons += [f"{env.zones[z]!r} is late, and can't be done without" for z in sorted(late)]
    reasons += [f"{zone!r} failed {zone.read_errors} reads" for zone in env.zones if zone.read_errors]
    return reasons


def _copy_reasons(vdis: Iterable[VdiStatus], scrub: ScrubStatus, recovery: RecoveryStatus) -> list[str]:
    reasons = [
        f"VDI {vdi.name}: {vdi.damaged_bytes} bytes are damaged in every copy (sheepfold vdi damage {vdi.name})"
        for vdi in vdis
        if vdi.damaged_bytes
    ]
    if scrub.copies_unrepaired:
        reasons.append(f"{scrub.copies_unrepaired} bad copies could not be replaced")
    if recovery.copies_missing:
        reasons.append(f"{recovery.copies_missing} copies are missing")
    if recovery.objects_unreachable:
        reasons.append(f"{recovery.objects_unreachable} objects have no copy in service")
    reasons += [f"recovery: {problem}" for problem in recovery.problems]
    return reasons


def _fewer_copies(env: Env, vdis: Iterable[Vdi]) -> list[tuple[str, int]]:
    """(one line, how many) for each open VDI that has segments with fewer copies in service than it asks for."""
    lines = []
    for vdi in vdis:
        wanted = vdi.disk.writer.copies
        fewer = sum(len(env.serving(s.zones)) < wanted for s in vdi.disk.segments.values())
        if fewer:
            lines.append((f"VDI {vdi.name}: {fewer} segments have fewer than {wanted} copies in service", fewer))
    return lines


async def _member_status(store: SummarizedStore, member: Member, thorough: bool) -> ZoneStatus:
    env, epoch = store.env, store.membership.epoch
    zone = env.zones[member.number]
    since = epoch.number
    for each in reversed(store.membership.history.epochs):
        if all(other.id != member.id for other in each.members):
            break
        since = each.number
    used = free = 0
    try:
        if thorough:
            used, free = await run_long(env.executor, member.number, measure, zone.backend)
    except StoreError:
        pass
    return ZoneStatus(
        number=member.number,
        id=member.id,
        path=member.path,
        state=member.state if zone.error is None else "failed",
        reason="" if zone.error is None else str(zone.error),
        weight=member.weight,
        used_bytes=used,
        free_bytes=free,
        epoch=epoch.number,
        since_epoch=since,
        lag_seconds=env.lag_seconds(member.number),
        read_errors=zone.read_errors,
        last_error=zone.last_error if zone.error is None else str(zone.error),
    )


def _out_status(env: Env, zone: Outside) -> ZoneStatus:
    return ZoneStatus(
        number=zone.number,
        id=zone.id,
        path=zone.path,
        state="out",
        reason=zone.reason,
        weight=zone.weight,
        used_bytes=0,
        free_bytes=0,
        epoch=zone.since - 1,
        since_epoch=zone.since,
        last_error=env.zones[zone.number].last_error or zone.reason,
    )


def measure(backend: Backend) -> tuple[int, int]:
    """In a zone's thread: (bytes used, bytes free); zeros if the zone can't say."""
    try:
        return backend.used_bytes(), backend.free_bytes()
    except StoreError:
        return 0, 0
