"""What a store is, apart from how it does: when it was made, its format, its epochs, what lies in its zones."""

from __future__ import annotations

import asyncio
from typing import Protocol

from objstore.backend.base import Backend
from objstore.errors import StoreError
from objstore.format.document import FORMAT_VERSION, Epoch, Member, Outside
from objstore.log.env import Env
from objstore.replica.members import ZonePlace
from objstore.replica.membership import Membership
from objstore.replica.zone import run_long
from objstore.volume.status import EpochInfo, StoreInfo, ZoneObjects


class DescribedStore(Protocol):
    """What the description needs of the store."""

    env: Env
    membership: Membership
    places: list[ZonePlace]


async def store_info(store: DescribedStore) -> StoreInfo:
    """Reads the zones' listings in their threads; writes nothing."""
    env, epoch = store.env, store.membership.epoch
    blocks = [place.superblock for place in store.places if place.superblock is not None]
    epochs = store.membership.history.epochs
    if not epochs or epochs[-1].id != epoch.id:
        epochs = [*epochs, epoch]
    zones = await asyncio.gather(*(_objects(env, member.number, member.path) for member in epoch.members))
    return StoreInfo(
        store_id=env.store_id.hex(),
        created=min(block.created for block in blocks),
        format_version=FORMAT_VERSION,
        features_read=sorted({name for block in blocks for name in block.features_read}),
        features_write=sorted({name for block in blocks for name in block.features_write}),
        features_check=sorted({name for block in blocks for name in block.features_check}),
        epoch=epoch.number,
        next_zone=max(store.membership.next_zone, len(env.zones)),
        epochs=[_epoch_info(each, before) for each, before in zip(epochs, [None, *epochs], strict=False)],
        zones=sorted(zones, key=lambda zone: zone.number),
        segments=sum(zone.segments for zone in zones),
        segment_bytes=sum(zone.segment_bytes for zone in zones),
        checkpoints=sum(zone.checkpoints for zone in zones),
        checkpoint_bytes=sum(zone.checkpoint_bytes for zone in zones),
    )


async def _objects(env: Env, number: int, path: str) -> ZoneObjects:
    try:
        counts = await run_long(env.executor, number, _count, env.zones[number].backend)
    except StoreError as error:
        return ZoneObjects(number=number, path=path, reason=str(error))
    segments, segment_bytes, checkpoints, checkpoint_bytes = counts
    return ZoneObjects(
        number=number,
        path=path,
        segments=segments,
        segment_bytes=segment_bytes,
        checkpoints=checkpoints,
        checkpoint_bytes=checkpoint_bytes,
    )


def _count(backend: Backend) -> tuple[int, int, int, int]:
    """In a zone's thread: segments, checkpoints and their bytes."""
    segments, checkpoints = backend.list("log/"), backend.list("checkpoint/")
    return (
        len(segments),
        sum(entry.size_bytes for entry in segments),
        len(checkpoints),
        sum(entry.size_bytes for entry in checkpoints),
    )


def _epoch_info(epoch: Epoch, before: Epoch | None) -> EpochInfo:
    return EpochInfo(
        number=epoch.number,
        id=epoch.id,
        time=epoch.wall,
        members=[member.number for member in epoch.members],
        paths=[member.path for member in epoch.members],
        out=[zone.number for zone in epoch.out],
        w=epoch.w,
        complete=epoch.complete,
        reason=why(epoch, before),
    )


def why(epoch: Epoch, before: Epoch | None) -> str:
    """What an epoch was made for, as far as it and the one before it tell."""
    reasons: list[str] = []
    if epoch.start:
        reasons.append("start" + (", forced" if epoch.forced else ""))
    now = {member.id: member for member in epoch.members}
    former = {member.id: member for member in before.members} if before is not None else now
    known = _ids(before) if before is not None else _ids(epoch)
    for zone in epoch.out:
        if zone.id in former:
            reasons.append(f"zone {zone.number} out: {zone.reason}")
    for member in epoch.members:
        was = former.get(member.id)
        if was is None:
            reasons.append(f"zone {member.number} {'back' if member.id in known else 'added'}")
        elif was.state != member.state:
            reasons.append(f"zone {member.number} {member.state}")
        elif was.weight != member.weight:
            reasons.append(f"zone {member.number} has weight {member.weight:g}")
    gone = known - _ids(epoch)
    reasons += [f"zone {number} removed" for number in sorted(_numbers(before, gone))]
    return "; ".join(reasons) or "the catalog's head changed"


def _zones(epoch: Epoch) -> list[Member | Outside]:
    return [*epoch.members, *epoch.out]


def _ids(epoch: Epoch) -> set[str]:
    return {zone.id for zone in _zones(epoch)}


def _numbers(epoch: Epoch | None, ids: set[str]) -> list[int]:
    return [] if epoch is None else [zone.number for zone in _zones(epoch) if zone.id in ids]
