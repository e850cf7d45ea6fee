"""Which zones make up a store, and what is said when they don't."""

import random
from pathlib import Path

import pytest

from objstore.backend.directory import DirectoryBackend
from objstore.backend.memory import MemoryBackend, MemoryStorage
from objstore.errors import Busy, FormatError, InvalidRequest
from objstore.format.document import CatalogHead, Epoch, Known, Member, Superblock, encode_document
from objstore.replica.epochs import NO_EPOCH, default_w
from objstore.replica.members import (
    EPOCHS_KEPT,
    FEATURES,
    SUPERBLOCK,
    ZONES_MAX,
    ZonePlace,
    check_one_store,
    drop_old_epochs,
    heal,
    initialise,
    lock_zones,
    look_at_zones,
    note_members,
    read_epochs,
    read_superblock,
    unfinished,
)
from objstore.replica.membership import epoch_name
from tests.conftest import ExpectedWarnings
from tests.support.stepping import HandClock

HEAD = CatalogHead(snapshot=0, generation=0, first_number=0, position=0, previous_crc=0)


class Zones:
    """Storages of one store's zones; each look is that of a new process."""

    def __init__(self, count: int, *, seed: int = 1, folder: str = "z") -> None:
        self.storages = [MemoryStorage() for _ in range(count)]
        self.paths = [f"/{folder}{i}" for i in range(count)]
        self.rng = random.Random(seed)
        initialise(self.look(), self.rng, HandClock())

    def look(self) -> list[ZonePlace]:
        places, unusable = look_at_zones(
            [(MemoryBackend(storage), path) for storage, path in zip(self.storages, self.paths, strict=True)]
        )
        assert not unusable
        return places

    def epoch(self, number: int, parent: Epoch | None = None, *, zones: list[int] | None = None) -> Epoch:
        places = self.look()
        epoch = Epoch(
            number=number,
            id=self.rng.randbytes(16).hex(),
            parent=parent.id if parent is not None else NO_EPOCH,
            members=[Member(number=i, id=zone_id(place), path=place.path) for i, place in enumerate(places)],
            out=[],
            w=default_w(len(places)),
            wall=1.0,
            start=True,
            catalog=HEAD,
            next_zone=0,
            complete=True,
        )
        for place in places if zones is None else [places[i] for i in zones]:
            place.backend.put(epoch_name(number), encode_document("epoch", epoch))
        return epoch


def zone_id(place: ZonePlace) -> str:
    assert place.superblock is not None
    return place.superblock.zone


def test_a_zone_of_another_store_is_named() -> None:
    ours, theirs = Zones(2), Zones(2, seed=2, folder="y")
    with pytest.raises(InvalidRequest, match=r"/y1 belongs to store .*, but /z0 to store"):
        check_one_store([ours.look()[0], theirs.look()[1]])


def test_a_copied_zone_is_refused_by_both_names() -> None:
    zones = Zones(2)
    zones.storages.append(zones.storages[1])
    zones.paths.append("/copy")
    with pytest.raises(InvalidRequest, match="/copy and /z1 are the same zone"):
        check_one_store(zones.look())


@pytest.mark.parametrize("kind", ["features_read", "features_write"])
def test_unknown_features_are_named(kind: str) -> None:
    zones = Zones(1)
    (place,) = zones.look()
    assert place.superblock is not None
    fields = {field: getattr(place.superblock, field) for field in place.superblock.__struct_fields__}
    place.backend.put(SUPERBLOCK, encode_document("superblock", Superblock(**{**fields, kind: [*FEATURES, "pigeons"]})))
    with pytest.raises(FormatError, match="/z0 needs features that this program does not know: pigeons"):
        check_one_store(zones.look())


def test_a_feature_that_only_a_checker_must_know_does_not_matter() -> None:
    zones = Zones(1)
    (place,) = zones.look()
    assert place.superblock is not None
    fields = {field: getattr(place.superblock, field) for field in place.superblock.__struct_fields__}
    place.backend.put(SUPERBLOCK, encode_document("superblock", Superblock(**{**fields, "features_check": ["x"]})))
    check_one_store(zones.look())


def test_a_store_of_a_trial_version_is_refused() -> None:
    zones = Zones(1)
    (place,) = zones.look()
    assert place.superblock is not None
    fields = {field: getattr(place.superblock, field) for field in place.superblock.__struct_fields__}
    place.backend.put(SUPERBLOCK, encode_document("superblock", Superblock(**{**fields, "features_read": []})))
    with pytest.raises(FormatError, match="/z0 is of a trial version without: membership"):
        check_one_store(zones.look())


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    backend = DirectoryBackend(str(tmp_path))
    try:
        with pytest.raises(InvalidRequest, match=r"neither empty nor a zone .*it holds holiday.jpg"):
            read_superblock(backend, str(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    finally:
        backend.close()


def test_too_many_zones() -> None:
    places = [ZonePlace(MemoryBackend(), f"/{i}", None) for i in range(ZONES_MAX + 1)]
    with pytest.raises(InvalidRequest, match="at most 64"):
        initialise(places, random.Random(1), HandClock())


def test_a_held_lock_names_its_holder() -> None:
    zones = Zones(2)
    lock_zones(zones.look(), "pid 17")
    with pytest.raises(Busy, match="pid 17"):
        lock_zones(zones.look(), "pid 18")


def test_initialisation_is_unfinished_until_an_epoch_is_anywhere() -> None:
    zones = Zones(2)
    assert unfinished(zones.look())
    zones.epoch(1, zones=[1])
    assert not unfinished(zones.look())


def test_superblocks_tell_where_the_zones_are() -> None:
    zones = Zones(2)
    places = zones.look()
    assert places[0].superblock is not None
    now = [Known(member.number, member.id, f"/new{member.number}") for member in places[0].superblock.members]
    note_members(places, now)
    for place in zones.look():
        assert place.superblock is not None
        assert place.superblock.members == now
        check_one_store([place])


# -- epochs -------------------------------------------------------------------------------------------------------


def held(zones: Zones) -> tuple[dict[str, list[Epoch]], list[str]]:
    """Everything that the zones hold, healed, and the zones that can't be judged."""
    found: dict[str, list[Epoch]] = {}
    damaged: dict[str, dict[int, FormatError]] = {}
    for place in zones.look():
        found[zone_id(place)], damaged[zone_id(place)] = read_epochs(place)
    return found, heal(found, damaged)


def test_a_fresh_store_has_no_epoch() -> None:
    assert set(map(len, held(Zones(2))[0].values())) == {0}


@pytest.mark.parametrize("damaged", [[0], [1], [0, 1]])
def test_a_damaged_copy_counts_as_held(damaged: list[int], expected_warnings: ExpectedWarnings) -> None:
    """Records appear whole or not at all, so what is there but unreadable was there; another zone's copy tells what."""
    expected_warnings.allow("an epoch record is damaged: /z. *")
    zones = Zones(3)
    first = zones.epoch(1)
    second = zones.epoch(2, first)
    for zone in damaged:
        zones.storages[zone].objects[epoch_name(2)][-5] ^= 1
    found, lost = held(zones)
    assert not lost
    assert all(sorted(epoch.id for epoch in epochs) == sorted((first.id, second.id)) for epochs in found.values())


def test_a_zone_of_whose_newest_record_nobody_knows_is_left_out(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("an epoch record is damaged")
    zones = Zones(2)
    zones.epoch(2, zones.epoch(1), zones=[1])
    zones.storages[1].objects[epoch_name(2)][-5] ^= 1
    found, lost = held(zones)
    assert lost == [zone_id(zones.look()[1])]
    assert list(found) == [zone_id(zones.look()[0])]


def newer(zones: Zones, zone: int, name: str) -> None:
    """Turn over the version digit of a document, which its checksum does not cover."""
    stored = zones.storages[zone].objects
    stored[name] = bytearray(bytes(stored[name]).replace(b" 1 crc32c", b" 2 crc32c", 1))


def test_a_newer_epoch_record_is_refused_and_not_passed_over(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("an epoch record is damaged")
    zones = Zones(2)
    zones.epoch(2, zones.epoch(1))
    newer(zones, 0, epoch_name(2))
    found, lost = held(zones)
    assert not lost, "the other zone's copy tells its version"
    assert len(set(map(len, found.values()))) == 1
    newer(zones, 1, epoch_name(2))
    with pytest.raises(FormatError, match="format version 2, this program knows up to 1"):
        held(zones)


def test_a_newer_superblock_is_refused_if_all_are() -> None:
    zones = Zones(2)
    newer(zones, 0, SUPERBLOCK)
    backends = [(MemoryBackend(storage), path) for storage, path in zip(zones.storages, zones.paths, strict=True)]
    places, unusable = look_at_zones(backends)
    assert [place.path for place in places] == ["/z1"]
    assert "format version 2" in unusable["/z0"]
    newer(zones, 1, SUPERBLOCK)
    with pytest.raises(FormatError, match="format version 2"):
        look_at_zones(backends)


def test_a_zone_without_its_superblock_is_damaged_and_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "superblock").touch()
    backend = DirectoryBackend(str(tmp_path))
    try:
        _, unusable = look_at_zones([(backend, str(tmp_path))])
        assert "missing or empty" in unusable[str(tmp_path)]
    finally:
        backend.close()


def test_what_is_no_epoch_record_is_passed_over() -> None:
    zones = Zones(1)
    first = zones.epoch(1)
    (place,) = zones.look()
    place.backend.put("epoch/readme.txt", b"")
    assert held(zones)[0] == {zone_id(place): [first]}


def test_old_epochs_go_and_those_that_a_head_needs_stay() -> None:
    zones = Zones(1)
    epoch = None
    chain = set()
    for number in range(1, EPOCHS_KEPT + 9):
        epoch = zones.epoch(number, epoch)
        chain.add(epoch.id)
    (place,) = zones.look()
    drop_old_epochs(place.backend, 3, chain)
    assert next(entry.name for entry in place.backend.list("epoch/")) == epoch_name(3)
    drop_old_epochs(place.backend, 100, chain)
    names = [entry.name for entry in place.backend.list("epoch/")]
    assert names == [epoch_name(number) for number in range(9, EPOCHS_KEPT + 9)]


def test_records_of_another_branch_go() -> None:
    zones = Zones(1)
    first = zones.epoch(1)
    zones.epoch(2, first)
    third = zones.epoch(3, first)
    (place,) = zones.look()
    drop_old_epochs(place.backend, 0, {first.id, third.id})
    assert [entry.name for entry in place.backend.list("epoch/")] == [epoch_name(1), epoch_name(3)]
