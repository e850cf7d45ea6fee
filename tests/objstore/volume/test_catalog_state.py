"""The catalog's contents: what is looked up says what a search through everything would."""

import random

from objstore.format.catalog import DeleteEntry, SnapshotDeleteEntry, SnapshotEntry, VdiEntry
from objstore.volume.catalog import CatalogState

NAMES = ("a", "b", "c")


def vdi_entry(dice: random.Random, state: CatalogState, vdi_id: int) -> VdiEntry:
    old = state.vdis.get(vdi_id)
    free = [name for name in NAMES if state.names.get(name, vdi_id) == vdi_id]
    return VdiEntry(
        vdi_id=vdi_id,
        name=dice.choice(free) if free else "a",
        log=state.next_log if old is None or dice.random() < 0.2 else old.log,
        size_bytes=1 << 20,
        copies=1,
        mode="writeback",
        created=0.0,
        prealloc=False,
        hidden=not free or dice.random() < 0.3,
    )


def snapshot_entry(dice: random.Random, state: CatalogState, snapshot_id: int) -> SnapshotEntry:
    vdi = dice.choice(list(state.vdis.values()))
    return SnapshotEntry(
        snapshot_id=snapshot_id,
        log=vdi.log,
        checkpoint=state.next_snapshot,
        position=0,
        vdi_id=vdi.vdi_id,
        tag=dice.choice(("", "s", "t")),
        index=state.next_snapshot,
        size_bytes=1 << 20,
        created=0.0,
    )


def check(state: CatalogState) -> None:
    everything = list(state.snapshots.values())
    for name in (*NAMES, "nobody"):
        named = state.snapshots_named(name)
        assert sorted(s.snapshot_id for s in named) == sorted(
            s.snapshot_id for s in everything if state.vdis[s.vdi_id].name == name
        )
        now = state.names.get(name)
        assert [s.vdi_id == now for s in named] == sorted((s.vdi_id == now for s in named), reverse=True)
    for vdi in state.vdis.values():
        assert state.snapshots_of(vdi.vdi_id) == [s for s in everything if s.vdi_id == vdi.vdi_id]
        assert state.snapshots_in(vdi.log) == [s for s in everything if s.log == vdi.log]


def test_what_is_looked_up_is_what_there_is() -> None:
    dice = random.Random(7)
    state = CatalogState()
    for _ in range(600):
        chance = dice.random()
        if chance < 0.3 or not state.vdis:
            state.apply(vdi_entry(dice, state, state.next_vdi))
        elif chance < 0.45:
            state.apply(vdi_entry(dice, state, dice.choice(list(state.vdis))))
        elif chance < 0.8:
            state.apply(snapshot_entry(dice, state, state.next_snapshot))
        elif chance < 0.9 and state.snapshots:
            state.apply(SnapshotDeleteEntry(snapshot_id=dice.choice(list(state.snapshots))))
        else:
            going = dice.choice(list(state.vdis))
            for snapshot in state.snapshots_of(going):
                state.apply(SnapshotDeleteEntry(snapshot_id=snapshot.snapshot_id))
            state.apply(DeleteEntry(vdi_id=going))
        check(state)
        if dice.random() < 0.05:
            state = CatalogState(state.snapshot())
            check(state)
