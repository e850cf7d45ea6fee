"""One point in several logs: where the snapshots of a group begin."""

import contextlib
from asyncio import Lock
from collections.abc import Sequence
from typing import Final, Protocol

from objstore.errors import StoreError
from objstore.log.disk import Disk
from objstore.log.keeper import Keeper

TRIES_WITHOUT_TURN: Final = 3


class Frozen(Protocol):
    """What is needed of a Vdi."""

    disk: Disk
    keeper: Keeper
    closed: StoreError | None

    @property
    def turn(self) -> Lock: ...


async def begin_together(vdis: Sequence[Frozen]) -> list[tuple[int, int]]:
    """Set the point of a snapshot, one instant for all of these VDIs: for each (number of the checkpoint that begins
    there, position of the last operation in it). What was acknowledged on any of them before this call is in it, what
    is asked for on any after its return is not. NoSpace: nothing has begun.

    vdis: in the order of their logs' numbers, as everybody takes turns who wants several. All of them are held when the
    checkpoints begin, in one loop turn. Where a checkpoint is under way the point comes behind it; clients' writes wait
    for that only when new ones begin again and again.
    """
    tries = 0
    while True:
        async with contextlib.AsyncExitStack() as turns:
            for vdi in vdis:
                await turns.enter_async_context(vdi.turn)
            while (late := _not_ready(vdis)) is not None:
                tries += 1
                if tries < TRIES_WITHOUT_TURN:
                    break
                await late.keeper.next_chance()
            else:
                return _begin(vdis)
        await late.keeper.next_chance()


def _not_ready(vdis: Sequence[Frozen]) -> Frozen | None:
    """One of them whose checkpoint can't begin now. Raises why one takes nothing any more."""
    for vdi in vdis:
        if vdi.closed is not None:
            raise vdi.closed
    return next((vdi for vdi in vdis if not vdi.keeper.ready_for_snapshot), None)


def _begin(vdis: Sequence[Frozen]) -> list[tuple[int, int]]:
    begun: list[tuple[int, int]] = []
    try:
        for vdi in vdis:
            number = vdi.keeper.begin_snapshot()
            begun.append((number, vdi.disk.writer.position))
    except StoreError:
        for vdi, (number, _) in zip(vdis, begun, strict=False):
            vdi.keeper.end_snapshot(number)
        raise
    return begun
