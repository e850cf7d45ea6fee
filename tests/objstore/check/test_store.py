"""What is no damage, and what is more than a flipped bit: leftovers, missing zones, wrong seals, cut logs."""

import random
import struct
from collections.abc import Sequence

import pytest
from crc32c import crc32c

from objstore.check.check import check_store, repair
from objstore.check.layout import PAGE
from objstore.check.report import Severity, Verdict
from objstore.errors import InvalidRequest, NewerFormat, NotFound, Unavailable
from tests.conftest import ExpectedWarnings
from tests.objstore.check.stores import CATALOG, CHECKPOINT, LOG, Checked, faults, named, used_store
from tests.support.check_zones import ObjectZone
from tests.support.disks import ModelDisk
from tests.support.stepping import World, failing, turns


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("copies", [1, 2, 3])
async def test_stores_of_the_product_are_clean(clean: bool, copies: int) -> None:
    store = await used_store(clean=clean, copies=copies)
    before = store.snapshot()
    report = store.check()
    assert faults(report) == []
    assert report.verdict is Verdict.CLEAN
    assert store.snapshot() == before, "a check changes nothing"


async def test_a_new_store_is_clean() -> None:
    world = World(3)
    await world.open(create=True)
    await world.kill()
    assert Checked(world).check().findings == []


async def test_a_store_without_any_epoch_holds_nothing() -> None:
    world = World(2)
    await world.open(create=True)
    await world.stop()
    for storage in world.storages:
        for name in [name for name in storage.objects if name != "superblock"]:
            del storage.objects[name]
    with pytest.raises(NotFound, match="never opened"):
        Checked(world).check()


async def test_orphans_are_named_and_removed() -> None:
    """A copy of a segment under a number that nobody knows, in the tail and below it; a snapshot of no epoch."""
    store = await used_store()
    store.repair()
    before = store.snapshot()
    objects = store.zones[0].objects
    name = store.names(LOG)[0]
    orphans = [f"{LOG}0000fff", f"{CHECKPOINT}00000001", "catalog/00000099", "log/000000/0000fff"]
    assert not set(orphans) & set(objects)
    objects[orphans[0]] = bytearray(objects[name])
    objects[orphans[1]] = bytearray(100)
    objects[orphans[2]] = bytearray(objects[store.newest("catalog/")])
    objects[orphans[3]] = bytearray(objects[store.names(CATALOG)[0]])
    report = store.check()
    found = {finding.name for finding in report.findings}
    assert found >= set(orphans)
    assert report.verdict is not Verdict.DAMAGE
    del objects[orphans[1]]
    assert store.repair().findings == []
    assert store.snapshot() == before


async def test_objects_of_deleted_and_of_unknown_logs() -> None:
    store = await used_store()
    opened = await store.world.open()
    await opened.delete_vdi("disk")
    await turns()
    await store.world.stop()
    assert store.check().findings == []
    objects = store.zones[1].objects
    objects["log/000001/0000003"] = bytearray(PAGE)
    objects["log/0000ff/0000003"] = bytearray(PAGE)
    report = store.check()
    assert named(report) == {("/zone1", "log/000001/0000003"), ("/zone1", "log/0000ff/0000003")}
    assert report.verdict is Verdict.FAULTS
    store.repair()
    assert "log/000001/0000003" not in objects, "its log's deletion was complete"
    assert "log/0000ff/0000003" in objects, "an unknown log is not touched"


async def test_a_missing_zone_is_named_and_the_rest_is_checked() -> None:
    store = await used_store()
    report = store.check([0, 2])
    assert report.verdict is Verdict.FAULTS
    assert [finding.kind for finding in faults(report)] == ["missing-zone"]
    assert "zone1" in faults(report)[0].text
    assert report.zones[-1] == (1, "zone1", "missing")
    assert report.checked["copies on missing zones"] > 0


async def test_two_missing_zones_leave_data_that_nobody_can_judge() -> None:
    store = await used_store(copies=2)
    report = store.check([1])
    assert report.verdict is Verdict.UNAVAILABLE
    assert [finding for finding in report.findings if finding.severity is Severity.DAMAGE] == []
    lost = [finding for finding in report.findings if finding.kind == "data-lost"]
    assert lost
    assert all(finding.ranges for finding in lost)


async def test_zones_that_do_not_belong_together() -> None:
    store = await used_store(rounds=1)
    twin = ObjectZone("/twin", store.zones[0].objects)
    with pytest.raises(InvalidRequest, match="/twin is a copy of another zone"):
        check_store([*store.zones, twin])
    with pytest.raises(NotFound, match="no superblock can be read in /empty"):
        check_store([ObjectZone("/empty", {})])
    world = World(3)
    world.rng = random.Random(6)
    await world.open(create=True)
    await world.kill()
    store.zones[2] = Checked(world).zones[2]
    with pytest.raises(InvalidRequest, match="belongs to another store"):
        store.check()


async def test_a_newer_format_is_refused() -> None:
    store = await used_store(rounds=1)
    for zone in store.zones:
        block = zone.objects["superblock"]
        block[: len(b"SHEEPFOLD superblock 1")] = b"SHEEPFOLD superblock 2"
        if zone is not store.zones[-1]:
            assert ("/zone0", "superblock") in named(store.check()), "one rotten digit, by all that can be known"
    with pytest.raises(NewerFormat, match="version 2"):
        store.check()


async def test_scenario_35_repair_with_a_zone_missing() -> None:
    """What has a good copy is mended; what the missing zone should hold is said; nothing is removed."""
    store = await used_store(copies=3)
    store.repair()
    name = next(name for name in store.names(LOG) if len(store.holders(name)) == 3)
    orphan = f"{LOG}0000fff"
    good = bytes(store.zones[0].objects[name])
    store.flip(name, 2 * PAGE + 9, zones=[0])
    store.zones[0].objects[orphan] = bytearray(good)
    here = [store.zones[0], store.zones[2]]
    report = repair(here, check_store(here))
    assert report.repaired == [f"/zone0/{name}: written anew from a good copy"]
    assert store.zones[0].objects[name] == good
    assert orphan in store.zones[0].objects
    assert [finding.kind for finding in faults(report)] == ["missing-zone"]
    assert report.verdict is Verdict.FAULTS


async def test_a_copy_of_another_writer_is_not_taken_for_the_right_one() -> None:
    """A zone from a backup: its copy is valid, sealed, and not the one that the checkpoint means."""
    store = await used_store()
    store.repair()
    name = next(name for name in store.names(LOG) if len(store.holders(name)) > 1)
    zone = store.holders(name)[0]
    before = store.snapshot()
    reseal(store.zones[zone].objects[name])
    report = store.check()
    assert (f"/zone{zone}", name) in named(report)
    assert report.verdict is Verdict.FAULTS
    assert store.repair().verdict is Verdict.CLEAN
    assert store.snapshot() == before


def reseal(data: bytearray) -> None:
    """Another generation, in footer and header, with valid checksums: another writer's segment."""
    records = [block * PAGE for block in range(len(data) // PAGE) if data[block * PAGE :][:8] == b"SHEEPREC"]
    assert records
    data[40] ^= 1
    checksum(data, 0, PAGE, 8)
    data[-128 + 36] ^= 1
    checksum(data, len(data) - 128, 128, 8)


def checksum(data: bytearray, start: int, length: int, at: int) -> None:
    """Make the checksum of a structure right again that has it at offset `at`."""
    data[start + at : start + at + 4] = bytes(4)
    crc = crc32c(bytes(data[start : start + length]))
    data[start + at : start + at + 4] = crc.to_bytes(4, "little")


async def test_the_end_of_a_killed_log() -> None:
    """What only one zone has is not damage; what was flushed and is gone everywhere is."""
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=256).create(copies=2)
    await disk.churn(20)
    await disk.vdi.flush()
    for block in range(3):
        await disk.write(block)
        await disk.vdi.flush()
    await world.kill()
    store = Checked(world)
    assert store.check().verdict is Verdict.CLEAN
    names = sorted({name for zone in range(3) for name in store.names(LOG, zone) if store.has_records(name)})
    zone = store.holders(names[-1])[0]
    store.flip(names[-1], PAGE + 20, zones=[zone])
    report = store.check()
    assert [finding.zone for finding in report.findings if "lacks the log" in finding.text] == [f"/zone{zone}"]
    assert report.verdict is not Verdict.DAMAGE
    store.flip(names[-1], PAGE + 20, zones=[zone])
    store.flip(names[-1], PAGE + 20)
    report = store.check()
    assert report.verdict is Verdict.DAMAGE
    assert "log-cut" in {finding.kind for finding in report.findings}
    changed = store.snapshot()
    store.repair()
    assert store.snapshot() == changed, "nothing of a damaged log is removed or written"


async def test_a_checkpoint_that_does_not_follow_from_the_log() -> None:
    """Map pages, root and table are valid by themselves and say something else than the log."""
    store = await used_store(copies=3)
    store.repair()
    name = max((n for n in store.names(CHECKPOINT)), key=lambda n: len(store.zones[0].objects[n]))
    data = store.zones[0].objects[name]
    assert data[PAGE + 12] in (1, 2, 3)
    for zone in store.zones:
        misdirect(zone.objects[name], name)
    report = store.check()
    assert report.verdict is Verdict.DAMAGE
    kinds = {finding.kind for finding in faults(report)}
    assert "replay" in kinds or "map" in kinds


def misdirect(data: bytearray, name: str) -> None:
    """Change an entry of the first frame's page, and make its checksum right again."""
    store, log, number = struct.unpack_from("<16sII", data, 16)
    footer = data[-128:]
    root_offset, root_count = struct.unpack_from("<QQ", footer, 36)
    for index in range(root_count):
        at = root_offset + 24 * index
        region, checkpoint, length, offset = struct.unpack_from("<QIIQ", data, at)
        if checkpoint == number and offset == PAGE:
            entry = PAGE + 12 + 8
            data[entry] ^= 1
            page = bytes(data[PAGE + 12 : PAGE + length])
            crc = crc32c(page, crc32c(struct.pack("<16sIIQ", store, log, number, region)))
            data[PAGE + 4 : PAGE + 8] = crc.to_bytes(4, "little")
            return
    raise AssertionError(f"{name} has no frame on page 1")


async def test_a_counter_that_is_too_low() -> None:
    store = await used_store(copies=3)
    store.repair()
    name = store.newest(CHECKPOINT)
    for zone in store.zones:
        data = zone.objects[name]
        footer = data[-128:]
        offset, count = struct.unpack_from("<QQ", footer, 52)
        rows = [offset + 32 * index for index in range(count)]
        row = next(at for at in rows if struct.unpack_from("<I", data, at + 12)[0] > 0)
        data[row + 12 : row + 16] = bytes(4)
        footer[72:76] = crc32c(bytes(data[offset : offset + 32 * count])).to_bytes(4, "little")
        footer[8:12] = bytes(4)
        footer[8:12] = crc32c(bytes(footer)).to_bytes(4, "little")
        data[-128:] = footer
    report = store.check()
    assert [finding.kind for finding in faults(report)] == ["counter"]


async def test_a_zone_that_cannot_be_read_is_not_the_end() -> None:
    store = await used_store()
    name = next(name for name in store.names(LOG) if len(store.holders(name)) > 1)

    class Broken(ObjectZone):
        def read(self, wanted: str, offset: int, length: int) -> bytes:
            if wanted == name:
                raise OSError(5, "Input/output error")
            return super().read(wanted, offset, length)

    zone = store.holders(name)[0]
    store.zones[zone] = Broken(f"/zone{zone}", store.zones[zone].objects)
    report = store.check()
    assert named(report) == {(f"/zone{zone}", name)}
    assert "Input/output error" in faults(report)[0].text


class Unlistable(ObjectZone):
    """A zone that can't say what it has in one of its folders."""

    folder = ""

    def list(self, folder: str) -> Sequence[str]:
        if folder == self.folder:
            raise OSError(5, "Input/output error")
        return super().list(folder)


@pytest.mark.parametrize("folder", ["", "epoch", "catalog", "log", "log/000000", "log/000001", "checkpoint/000001"])
async def test_a_zone_that_cannot_be_listed_is_as_good_as_missing(folder: str) -> None:
    """What it doesn't list must not be taken for lost, nor repaired there."""
    store = await used_store()
    store.zones[1] = Unlistable("/zone1", store.zones[1].objects)
    store.zones[1].folder = folder
    report = store.check()
    found = {(finding.zone, finding.name): finding.text for finding in faults(report)}
    assert "Input/output error; the zone was checked as if it were missing" in found["/zone1", folder]
    assert {finding.kind for finding in faults(report)} == {"zone", "missing-zone"}
    assert not any(finding.repair for finding in report.findings if finding.zone == "/zone1")
    for zone in (0, 2):
        store.zones[zone] = Unlistable(f"/zone{zone}", store.zones[zone].objects)
        store.zones[zone].folder = folder
    with pytest.raises(Unavailable, match="can't be listed: Input/output error"):
        store.check()


async def test_a_zone_that_failed_while_it_was_used() -> None:
    """What the product leaves behind when a sync fails is no damage."""
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=256).create(copies=2)
    await disk.churn(20)
    await disk.vdi.flush()
    world.backends[0].fault = failing("sync")
    await world.kill()
    assert Checked(world).check().verdict is Verdict.CLEAN


async def test_names_that_belong_to_nothing_are_notes() -> None:
    store = await used_store(rounds=1)
    for name in ("lost+found/x", "log/000001/abc", "epoch/1", "log/zz"):
        store.zones[0].objects[name] = bytearray(b"?")
    report = store.check()
    assert report.verdict is Verdict.CLEAN
    unknown = {finding.name for finding in report.findings if finding.kind == "unknown"}
    assert unknown == {"lost+found", "log/000001/abc", "epoch/1", "log/zz"}
    store.repair()
    assert "log/000001/abc" in store.zones[0].objects


async def test_a_scrub_note_is_checked_and_not_missed() -> None:
    store = await used_store(rounds=1)
    text = b'{"started":1.5,"finished":0,"log":1,"segment":7}'
    note = b"SHEEPFOLD scrub 1 crc32c=%08x\n%s\n" % (crc32c(text), text)
    for zone in store.zones:
        zone.objects["scrub"] = bytearray(note)
    assert store.check().verdict is Verdict.CLEAN
    store.flip("scrub", 40, zones=[1])
    assert named(store.check()) == {("/zone1", "scrub")}
    assert store.repair().verdict is Verdict.CLEAN
    assert "scrub" not in store.zones[1].objects
    assert "scrub" in store.zones[0].objects


async def test_a_zone_that_was_put_out_is_named_and_not_believed(expected_warnings: ExpectedWarnings) -> None:
    """Its copy of the open segment is valid as far as it goes; the log is longer."""
    expected_warnings.allow("is put out|is out of service")
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world, blocks=256).create(copies=3)
    await disk.churn(5)
    await disk.vdi.flush()
    world.backends[2].fault = failing("write", times=1000)
    await disk.churn(20)
    await disk.vdi.flush()
    await world.kill()
    store = Checked(world)
    report = store.check()
    assert report.counts[Severity.DAMAGE] == report.counts[Severity.UNAVAILABLE] == 0
    assert {finding.kind for finding in faults(report)} <= {"zone-out", "few-copies"}
    assert [(number, state) for number, _, state in report.zones] == [(0, "checked"), (1, "checked"), (2, "out")]
    alone = store.check([2])
    assert alone.verdict is Verdict.UNAVAILABLE
    assert "epoch" in {finding.kind for finding in faults(alone)}


async def test_records_under_a_header_that_no_zone_has_are_not_removed() -> None:
    store = await used_store(clean=False)
    names = {name for zone in range(3) for name in store.names(LOG, zone) if store.has_records(name)}
    name = max(names)
    store.flip(name, 20)
    before = store.snapshot()
    report = store.check()
    assert report.verdict is not Verdict.CLEAN
    assert name in {finding.name for finding in faults(report)}
    store.repair()
    assert [zone.get(name) for zone in store.snapshot()] == [zone.get(name) for zone in before]
