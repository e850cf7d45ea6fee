"""Whole stores as they were left by the program that made format version 1: everything is in them, the check agrees,
and they can be worked with. What a later version has written is refused by name and not touched."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from crc32c import crc32c

from nbdserver.cli import main
from objstore.check.check import check_store, zones_of
from objstore.check.report import Severity
from objstore.check.zones import all_locked
from objstore.volume.store import Store, open_store
from tests.conftest import ExpectedWarnings
from tests.format import make_store as golden

KINDS = ("clean", "killed")


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Both stores, in a directory of this test's own."""
    with tarfile.open(golden.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def zones(stores: Path, kind: str) -> list[Path]:
    return [stores / kind / name for name in golden.ZONES]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def faults(stores: Path, kind: str) -> list[str]:
    places = zones_of(zones(stores, kind))
    with all_locked(places, exclusive=False):
        report = check_store(places)
    return [str(finding) for finding in report.findings if finding.severity is not Severity.NOTE]


async def read(store: Store, name: str) -> bytes:
    volume = await store.open(name)
    data = bytearray(volume.size_bytes)
    if await volume.read(0, len(data), memoryview(data)) == len(data):
        data = bytearray(len(data))
    await store.close(volume)
    return bytes(data)


def test_the_archive_has_not_changed() -> None:
    """It stands for what users have on their disks: a new version gets an archive of its own."""
    assert crc32c(golden.ARCHIVE.read_bytes()) == 0xD3F3B6EE


@pytest.mark.parametrize("kind", KINDS)
async def test_everything_is_in_it(stores: Path, kind: str, expected_warnings: ExpectedWarnings) -> None:
    assert faults(stores, kind) == []
    store = await open_store(zones(stores, kind), settings=golden.SETTINGS)
    try:
        assert (store.unclean_stop is None) == (kind == "clean")
        assert [(vdi.name, vdi.size_bytes, vdi.copies) for vdi in store.vdis()] == [
            ("clone", golden.DISK_BYTES, 2),
            ("disk", golden.DISK_BYTES, 2),
        ]
        assert await read(store, "disk") == golden.disk_bytes()
        assert await read(store, "disk@monday") == golden.snapshot_bytes()
        assert await read(store, "clone") == golden.clone_bytes()
        assert store.snapshot("disk@monday").protected
        assert store.attributes.get("disk", "key") == golden.ATTRIBUTE
    finally:
        await store.shutdown()
    assert faults(stores, kind) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_it_can_be_worked_with(stores: Path, kind: str) -> None:
    """Written, rolled back, and read by another start."""
    store = await open_store(zones(stores, kind), settings=golden.SETTINGS)
    disk = await store.open("disk")
    await disk.write(4096, memoryview(golden.pattern(9, 8192)))
    await disk.flush()
    await store.close(disk)
    await store.rollback("disk@monday")
    clone = await store.open("clone")
    await clone.write(4096, memoryview(golden.pattern(9, 8192)))
    await store.close(clone)
    await store.shutdown()
    assert faults(stores, kind) == []
    store = await open_store(zones(stores, kind), settings=golden.SETTINGS)
    try:
        assert await read(store, "disk") == golden.snapshot_bytes()
        changed = bytearray(golden.clone_bytes())
        changed[4096 : 4096 + 8192] = golden.pattern(9, 8192)
        assert await read(store, "clone") == bytes(changed)
    finally:
        await store.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_nothing_to_upgrade_in_it(stores: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(stores / kind)
    options = [word for one in zones(stores, kind) for word in ("--zone", str(one))]
    assert main(["store", "upgrade", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"format_version": 1, "changed": []}
    assert main(["store", "upgrade", *options]) == 0
    assert "nothing to change" in capsys.readouterr().out
    after = contents(stores / kind)
    assert {name: data for name, data in after.items() if Path(name).name not in golden.LEFT_OUT} == before


def newer(superblock: bytes, what: str) -> bytes:
    """A superblock as a later program might write it."""
    head, _, body = superblock.partition(b"\n")
    if what == "version":
        return superblock.replace(b"superblock 1 ", b"superblock 2 ", 1)
    fields = json.loads(body)
    fields[what] = [*fields.get(what, []), "holograms"]
    data = json.dumps(fields, separators=(",", ":")).encode()
    return head.partition(b" crc32c=")[0] + b" crc32c=%08x\n" % crc32c(data) + data + b"\n"


@pytest.mark.parametrize("what", ["version", "features_read", "features_write"])
@pytest.mark.parametrize("zone", ["a", "c"])
@pytest.mark.parametrize("command", [("store", "upgrade"), ("serve",), ("vdi", "create", "x", "1M")], ids=" ".join)
def test_what_a_later_program_wrote_is_refused_by_name(
    stores: Path, what: str, zone: str, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in any zone is changed. A feature in one zone is enough; the version is not under the checksum, so that
    alone in one zone is damage."""
    shutil.rmtree(stores / "killed")
    for path in (stores / "clean").glob("*/superblock"):
        if what == "version" or path.parent.name == zone:
            path.write_bytes(newer(path.read_bytes(), what))
    before = contents(stores / "clean")
    options = [word for one in zones(stores, "clean") for word in ("--zone", str(one))]
    assert main([*command, *options]) == 8
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(stores / "clean") in said
    assert ("version 2" in said and "up to 1" in said) if what == "version" else "holograms" in said
    after = contents(stores / "clean")
    assert {name: data for name, data in after.items() if Path(name).name not in golden.LEFT_OUT} == before
