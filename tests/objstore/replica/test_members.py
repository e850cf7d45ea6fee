"""Which zones make up a store, and what is said when they don't."""

import random
from pathlib import Path

import pytest

from objstore.backend.directory import DirectoryBackend
from objstore.backend.memory import MemoryBackend, MemoryStorage
from objstore.errors import Busy, Corrupt, FormatError, InvalidRequest, Unavailable
from objstore.format.document import CatalogHead, Epoch, Superblock, decode_document, encode_document
from objstore.replica.members import (
    EPOCHS_KEPT,
    NO_EPOCH,
    SUPERBLOCK,
    ZONES_MAX,
    ZonePlace,
    check_members,
    drop_old_epochs,
    epoch_name,
    initialise,
    lock_zones,
    look_at_zones,
    newest_epoch,
    next_epoch,
    read_superblock,
    unfinished,
    update_paths,
    write_epoch,
)
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
        return look_at_zones(
            [(MemoryBackend(storage), path) for storage, path in zip(self.storages, self.paths, strict=True)]
        )

    def epoch(self, number: int, parent: Epoch | None = None, *, zones: list[int] | None = None) -> Epoch:
        places = self.look()
        epoch = next_epoch(parent, number, len(places), HEAD, self.rng, 1.0)
        for place in places if zones is None else [places[i] for i in zones]:
            write_epoch(place, epoch)
        return epoch


def test_zones_come_out_in_the_order_of_their_numbers() -> None:
    zones = Zones(3)
    places = zones.look()
    for given in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert check_members([places[i] for i in given]) == places


def test_an_empty_zone_is_named() -> None:
    zones = Zones(2)
    zones.storages[1].objects.clear()
    with pytest.raises(InvalidRequest, match="/z1 is empty, but /z0 belongs to store"):
        check_members(zones.look())


def test_a_zone_of_another_store_is_named() -> None:
    ours, theirs = Zones(2), Zones(2, seed=2, folder="y")
    with pytest.raises(InvalidRequest, match=r"/y1 belongs to store .*, but /z0 to store"):
        check_members([ours.look()[0], theirs.look()[1]])


def test_a_copied_zone_is_refused_by_both_names() -> None:
    zones = Zones(2)
    zones.storages.append(zones.storages[1])
    zones.paths.append("/copy")
    with pytest.raises(InvalidRequest, match="/copy and /z1 are the same zone"):
        check_members(zones.look())


def test_missing_zones_are_named_with_their_places() -> None:
    zones = Zones(4)
    with pytest.raises(Unavailable, match=r"missing: /z1 \(zone .{8}\), /z3 \(zone"):
        check_members([zones.look()[i] for i in (0, 2)])


def test_a_zone_that_the_others_do_not_list() -> None:
    zones = Zones(2)
    (stranger,) = initialise([ZonePlace(MemoryBackend(), "/x", None)], random.Random(3), HandClock())
    ours = zones.look()
    assert ours[0].superblock is not None
    assert stranger.superblock is not None
    block = Superblock(store=ours[0].superblock.store, zone=stranger.superblock.zone, number=7, members=[], created=0.0)
    with pytest.raises(InvalidRequest, match="/x is not listed as a zone of store"):
        check_members([*ours, stranger._replace(superblock=block)])


@pytest.mark.parametrize("kind", ["features_read", "features_write"])
def test_unknown_features_are_named(kind: str) -> None:
    zones = Zones(1)
    (place,) = zones.look()
    assert place.superblock is not None
    fields = {field: getattr(place.superblock, field) for field in place.superblock.__struct_fields__}
    place.backend.put(SUPERBLOCK, encode_document("superblock", Superblock(**{**fields, kind: ["pigeons"]})))
    with pytest.raises(FormatError, match="/z0 needs features that this program does not know: pigeons"):
        check_members(zones.look())


def test_a_feature_that_only_a_checker_must_know_does_not_matter() -> None:
    zones = Zones(1)
    (place,) = zones.look()
    assert place.superblock is not None
    fields = {field: getattr(place.superblock, field) for field in place.superblock.__struct_fields__}
    place.backend.put(SUPERBLOCK, encode_document("superblock", Superblock(**{**fields, "features_check": ["x"]})))
    assert len(check_members(zones.look())) == 1


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


def test_superblocks_follow_their_zones() -> None:
    zones = Zones(2)
    zones.paths = ["/new0", "/new1"]
    update_paths(zones.look())
    for place in zones.look():
        assert place.superblock is not None
        assert [member.path for member in place.superblock.members] == ["/new0", "/new1"]


# -- epochs -------------------------------------------------------------------------------------------------------


def test_a_fresh_store_has_no_epoch() -> None:
    assert newest_epoch(Zones(2).look()) == (None, 0)


def test_the_newest_epoch_is_the_newest_that_every_zone_holds() -> None:
    zones = Zones(3)
    first = zones.epoch(1)
    second = zones.epoch(2, first)
    zones.epoch(3, second, zones=[0, 2])
    assert newest_epoch(zones.look()) == (second, 3)
    fourth = zones.epoch(4, second)
    assert fourth.parent == second.id
    assert newest_epoch(zones.look()) == (fourth, 4)


def test_equal_numbers_are_not_equal_epochs() -> None:
    zones = Zones(2)
    first = zones.epoch(1)
    zones.epoch(2, first, zones=[0])
    zones.epoch(2, first, zones=[1])
    assert newest_epoch(zones.look()) == (first, 2)


def test_a_first_epoch_that_did_not_reach_every_zone_was_never_used() -> None:
    zones = Zones(2)
    zones.epoch(1, zones=[0])
    assert newest_epoch(zones.look()) == (None, 1)


@pytest.mark.parametrize("damaged", [[0], [1], [0, 1]])
def test_a_damaged_copy_of_the_newest_epoch_does_not_hide_it(
    damaged: list[int], expected_warnings: ExpectedWarnings
) -> None:
    """Records appear whole or not at all, so what is there but unreadable was there; another zone's copy tells what."""
    expected_warnings.allow("an epoch record is damaged: /z. *")
    zones = Zones(3)
    first = zones.epoch(1)
    second = zones.epoch(2, first)
    for zone in damaged:
        zones.storages[zone].objects[epoch_name(2)][-5] ^= 1
    assert newest_epoch(zones.look()) == (second, 2)


def test_an_epoch_that_no_zone_can_read_stops_the_store(expected_warnings: ExpectedWarnings) -> None:
    """The one before names an older catalog: never go on with that."""
    expected_warnings.allow("an epoch record is damaged")
    zones = Zones(2)
    zones.epoch(2, zones.epoch(1))
    for storage in zones.storages:
        storage.objects[epoch_name(2)][-5] ^= 1
    with pytest.raises(Corrupt, match="epoch record 2"):
        newest_epoch(zones.look())


def test_a_newer_epoch_record_is_refused_and_not_passed_over() -> None:
    zones = Zones(2)
    zones.epoch(2, zones.epoch(1))
    stored = zones.storages[0].objects
    stored[epoch_name(2)] = bytearray(bytes(stored[epoch_name(2)]).replace(b"epoch 1 ", b"epoch 2 ", 1))
    with pytest.raises(FormatError, match="format version 2, this program knows up to 1"):
        newest_epoch(zones.look())


def test_old_epochs_go() -> None:
    zones = Zones(1)
    epoch = None
    for number in range(1, EPOCHS_KEPT + 5):
        epoch = zones.epoch(number, epoch)
    (place,) = zones.look()
    drop_old_epochs(place)
    names = [entry.name for entry in place.backend.list("epoch/")]
    assert names == [epoch_name(number) for number in range(5, EPOCHS_KEPT + 5)]
    stored = decode_document("epoch", place.backend.get(names[-1]), Epoch, "here")
    assert stored == epoch
    assert stored.parent != NO_EPOCH
