"""Damage in every kind of object is found, named and, where a good copy exists, repaired to the byte."""

import random
from collections.abc import Callable

import pytest

from objstore.check.layout import PAGE, Owner, directory
from objstore.check.report import Severity, Verdict
from objstore.check.segments import verify_sealed
from objstore.errors import Corrupt
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import CATALOG, CHECKPOINT, LOG, Checked, faults, named, used_store


@pytest.fixture
async def store() -> Checked:
    made = await used_store()
    assert made.repair().verdict is Verdict.CLEAN  # leftovers of checkpoints are cleared away
    report = made.check()
    assert report.findings == []
    assert report.checked["regions replayed"] > 0
    return made


def live_segment(store: Checked) -> str:
    """A sealed segment that is not in the tail and has several records."""
    report = store.check()
    names = sorted({name for zone in range(3) for name in store.names(LOG, zone)})
    owner = Owner(bytes.fromhex(report.store), 1)
    for name in names:
        data = bytes(store.zones[store.holders(name)[0]].objects[name])
        table = directory(data, owner, int(name[-7:], 16), len(data))
        if len(table.headers) > 1:
            return name
    raise AssertionError("no segment has several records")


def second_record(store: Checked, name: str) -> int:
    data = bytes(store.zones[store.holders(name)[0]].objects[name])
    owner = Owner(bytes.fromhex(store.check().store), 1)
    return int(verify_sealed(data, owner, int(name[-7:], 16)).directory.headers[1])


Place = Callable[[Checked], tuple[str, int]]
PLACES: dict[str, Place] = {
    "epoch": lambda store: (store.newest("epoch/"), 60),
    "epoch's first line": lambda store: (store.newest("epoch/"), 3),
    "catalog snapshot": lambda store: (store.newest("catalog/"), 40),
    "catalog record": lambda store: (store.names(CATALOG)[0], PAGE + 130),
    "catalog entry": lambda store: (store.names(CATALOG)[0], 2 * PAGE + 5),
    "segment header": lambda store: (live_segment(store), 45),
    "record header": lambda store: (live_segment(store), PAGE + 140),
    "second record header": lambda store: ((name := live_segment(store)), second_record(store, name) * PAGE + 20),
    "data": lambda store: (live_segment(store), 2 * PAGE + 1000),
    "directory": lambda store: (live_segment(store), -200),
    "footer": lambda store: (live_segment(store), -100),
    "footer's last byte": lambda store: (live_segment(store), -1),
    "checkpoint header": lambda store: (store.newest(CHECKPOINT), 50),
    "map page": lambda store: (frame_holder(store), PAGE + 30),
    "checkpoint footer": lambda store: (store.newest(CHECKPOINT), -90),
    "root": lambda store: (store.newest(CHECKPOINT), root_offset(store)),
    "segment table": lambda store: (store.newest(CHECKPOINT), -140),
}


def frame_holder(store: Checked) -> str:
    """The largest checkpoint: it has map pages."""
    sizes = {name: len(zone.objects[name]) for zone in store.zones for name in zone.objects if CHECKPOINT in name}
    return max(sizes, key=lambda name: sizes[name])


def root_offset(store: Checked) -> int:
    name = store.newest(CHECKPOINT)
    data = store.zones[store.holders(name)[0]].objects[name]
    return int.from_bytes(data[-128 + 36 : -128 + 44], "little")


@pytest.mark.parametrize("what", sorted(PLACES))
async def test_one_bad_copy_is_named_and_mended(store: Checked, what: str) -> None:
    name, offset = PLACES[what](store)
    zone = store.holders(name)[-1]
    before = store.snapshot()
    store.flip(name, offset, zones=[zone])
    report = store.check()
    assert report.verdict is Verdict.FAULTS
    assert named(report) == {(f"/zone{zone}", name)}
    if what.startswith("catalog ") and what != "catalog snapshot":
        return  # an end of a log is never edited: the next start writes its snapshot from the good copies
    mended = store.repair()
    assert mended.repaired == [f"/zone{zone}/{name}: written anew from a good copy"]
    assert mended.findings == []
    assert store.snapshot() == before


@pytest.mark.parametrize("what", sorted(PLACES))
async def test_damage_of_every_copy_is_not_repaired(store: Checked, what: str) -> None:
    name, offset = PLACES[what](store)
    store.flip(name, offset)
    before = store.snapshot()
    report = store.check()
    assert report.verdict in (Verdict.DAMAGE, Verdict.FAULTS)
    assert any(finding.name == name for finding in faults(report)) or report.verdict is Verdict.DAMAGE
    store.repair()
    after = store.snapshot()
    assert [zone.get(name) for zone in after] == [zone.get(name) for zone in before], "guessed"


async def test_lost_data_is_named_by_block(store: Checked, expected_warnings: ExpectedWarnings) -> None:
    """Only blocks that the map still looks for count as lost: those that the store can't read."""
    expected_warnings.allow("checksum|damaged|no zone has all|bad copies")
    rng = random.Random(3)
    for name in sorted({name for zone in range(3) for name in store.names(LOG, zone)}):
        blocks = len(store.zones[store.holders(name)[0]].objects[name]) // PAGE
        block = rng.randrange(2, min(blocks, 40))
        store.flip(name, block * PAGE + 7)
    report = store.check()
    assert report.verdict is Verdict.DAMAGE
    (found,) = [finding for finding in report.findings if finding.kind == "data-lost"]
    lost = {block for first, count in found.ranges for block in range(first, first + count)}
    opened = await store.world.open()
    vdi = await opened.open("disk")
    unreadable = set()
    for block in range(512):
        try:
            await vdi.read(block * PAGE, PAGE, memoryview(bytearray(PAGE)))
        except Corrupt:
            unreadable.add(block)
    await store.world.kill()
    assert lost == unreadable


async def test_good_blocks_of_two_bad_copies_make_a_whole_one(store: Checked) -> None:
    name = live_segment(store)
    before = store.snapshot()
    first, second = store.holders(name)
    store.flip(name, 2 * PAGE + 5, zones=[first])
    store.flip(name, 3 * PAGE + 5, zones=[second])
    store.flip(name, 20, zones=[second])
    assert store.check().verdict is Verdict.FAULTS
    assert store.repair().verdict is Verdict.CLEAN
    assert store.snapshot() == before


@pytest.mark.parametrize("seed", range(3))
async def test_any_flipped_bit_is_found(store: Checked, seed: int) -> None:
    """Except where nothing is said: in the catalog's log behind its end and in its directories, in past epochs."""
    rng = random.Random(seed)
    before = store.snapshot()
    epoch = store.newest("epoch/")
    for _ in range(25):
        zone = rng.randrange(3)
        name = rng.choice(
            [
                n
                for n in sorted(store.zones[zone].objects)
                if n not in ("lock", "scrub", "recovery") and not n.startswith(CATALOG)
            ]
        )
        if name.startswith("epoch/") and name != epoch:
            continue
        offset, bit = rng.randrange(len(store.zones[zone].objects[name])), 1 << rng.randrange(8)
        if name.startswith(LOG) and in_gap(store, zone, name, offset):
            continue
        store.flip(name, offset, zones=[zone], bit=bit)
        report = store.check()
        assert (f"/zone{zone}", name) in named(report), f"bit {bit} of byte {offset} of {name} in zone {zone}"
        assert report.counts[Severity.DAMAGE] == 0
        if name != "superblock":
            assert store.repair().verdict is Verdict.CLEAN
        else:
            store.flip(name, offset, zones=[zone], bit=bit)
        assert store.snapshot() == before


def in_gap(store: Checked, zone: int, name: str, offset: int) -> bool:
    """Whether the byte lies between the last record of a sealed segment and its directory: nothing is said there."""
    data = bytes(store.zones[zone].objects[name])
    table = directory(data, Owner(bytes.fromhex(store.check().store), 1), int(name[-7:], 16), len(data))
    return table.blocks * PAGE <= offset < table.table_start // PAGE * PAGE


@pytest.mark.parametrize("part", ["segment", "checkpoint", "snapshot", "epoch"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
async def test_missing_and_truncated_copies(store: Checked, part: str, how: str) -> None:
    name = {
        "segment": live_segment(store),
        "checkpoint": store.newest(CHECKPOINT),
        "snapshot": store.newest("catalog/"),
        "epoch": store.newest("epoch/"),
    }[part]
    zone = store.holders(name)[0]
    before = store.snapshot()
    objects = store.zones[zone].objects
    if how == "missing":
        del objects[name]
    else:
        del objects[name][len(objects[name]) // 2 if how == "truncated" else 0 :]
    report = store.check()
    if part == "epoch" and how == "missing":
        assert named(report) == {(f"/zone{zone}", name)}
        assert report.verdict is Verdict.FAULTS
        store.repair()
        assert name not in objects, "it says what the zone took part in: nobody else can know that"
        return
    assert (f"/zone{zone}", name) in named(report)
    assert report.verdict is Verdict.FAULTS
    assert store.repair().verdict is Verdict.CLEAN
    assert store.snapshot() == before


async def test_swapped_copies_of_two_segments(store: Checked) -> None:
    """Each is valid by itself and lies under the other's name."""
    zone = store.zones[0].objects
    first, second = [name for name in store.names(LOG) if len(store.holders(name)) > 1][:2]
    before = store.snapshot()
    zone[first], zone[second] = zone[second], zone[first]
    report = store.check()
    assert named(report) >= {("/zone0", first), ("/zone0", second)}
    assert report.verdict is Verdict.FAULTS
    assert store.repair().verdict is Verdict.CLEAN
    assert store.snapshot() == before


@pytest.mark.parametrize("how", ["rot", "gone", "digit"])
async def test_a_lost_superblock_is_written_anew(how: str) -> None:
    """The zones that are here and the headers of its segments tell which zone it is; the product opens it again."""
    store = await used_store(copies=3)
    store.repair()
    assert store.check().verdict is Verdict.CLEAN
    objects = store.zones[1].objects
    if how == "gone":
        del objects["superblock"]
    elif how == "rot":
        objects["superblock"][60] ^= 1
    else:
        objects["superblock"][: len(b"SHEEPFOLD superblock 1")] = b"SHEEPFOLD superblock 2"
    before = store.snapshot()
    assert store.check().verdict is Verdict.FAULTS
    assert store.snapshot() == before
    report = store.repair()
    assert any("superblock: written anew" in text for text in report.repaired)
    assert report.verdict is Verdict.CLEAN
    opened = await store.world.open()
    assert len(opened.membership.epoch.members) == 3
    await store.world.stop()


async def test_a_superblock_is_not_guessed() -> None:
    """Two zones without one: the headers list both, so that neither directory says which of them it is."""
    store = await used_store(copies=3)
    for zone in (1, 2):
        store.zones[zone].objects["superblock"][60] ^= 1
    before = store.snapshot()
    report = store.repair()
    assert not any("superblock" in text for text in report.repaired)
    assert [finding.zone for finding in report.findings if finding.kind == "superblock"] == ["/zone1", "/zone2"]
    for zone in (1, 2):
        assert store.snapshot()[zone] == before[zone]
