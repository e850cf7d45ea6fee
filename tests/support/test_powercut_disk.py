"""What survives a cut, on the model alone."""

import errno
import random
import stat

import pytest

from tests.support.powercut_disk import PAGE_BYTES, SECTOR_BYTES, Cut, Disk, Inode

FILE, DIRECTORY = stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700
SEEDS = range(200)


def new_disk(limit_bytes: int = 1 << 30) -> Disk:
    return Disk(limit_bytes)


def new_file(disk: Disk, name: bytes = b"f", *, durable: bytes = b"") -> Inode:
    """A file whose name and first contents survive a cut."""
    node = disk.create(disk.root, name, FILE, 0)
    disk.write(node, 0, durable, 0, durable=False)
    disk.sync_file(node)
    disk.sync_directory(disk.root)
    return node


def contents(disk: Disk, node: Inode) -> bytes:
    return disk.read(node, 0, node.size_bytes)


def drop(disk: Disk) -> None:
    disk.cut(Cut.DROP, random.Random(0))


def test_unsynced_bytes_and_size_go() -> None:
    disk = new_disk()
    node = new_file(disk, durable=b"old" * 3000)
    disk.write(node, 4, b"new" * 5000, 0, durable=False)
    assert contents(disk, node)[4:7] == b"new"
    drop(disk)
    assert contents(disk, node) == b"old" * 3000


def test_synced_bytes_stay() -> None:
    disk = new_disk()
    node = new_file(disk)
    disk.write(node, 100, b"x" * 10_000, 0, durable=False)
    disk.sync_file(node)
    drop(disk)
    assert contents(disk, node) == bytes(100) + b"x" * 10_000


def test_durable_write_promises_nothing_for_earlier_ones() -> None:
    disk = new_disk()
    node = new_file(disk)
    disk.write(node, 0, b"a" * PAGE_BYTES, 0, durable=False)
    disk.write(node, PAGE_BYTES, b"b" * PAGE_BYTES, 0, durable=True)
    drop(disk)
    assert contents(disk, node) == bytes(PAGE_BYTES) + b"b" * PAGE_BYTES


def test_unsynced_truncate_is_undone() -> None:
    disk = new_disk()
    node = new_file(disk, durable=b"x" * 10_000)
    disk.truncate(node, 5000, 0)
    disk.truncate(node, 9000, 0)
    assert contents(disk, node) == b"x" * 5000 + bytes(4000)
    drop(disk)
    assert contents(disk, node) == b"x" * 10_000


def test_file_sync_does_not_make_the_name_durable() -> None:
    disk = new_disk()
    node = disk.create(disk.root, b"f", FILE, 0)
    disk.write(node, 0, b"data", 0, durable=False)
    disk.sync_file(node)
    drop(disk)
    assert disk.root.entries == {}


def test_name_sync_does_not_make_the_bytes_durable() -> None:
    disk = new_disk()
    node = disk.create(disk.root, b"f", FILE, 0)
    disk.write(node, 0, b"data", 0, durable=False)
    disk.sync_directory(disk.root)
    drop(disk)
    assert contents(disk, disk.root.entries[b"f"]) == b""


def test_a_name_needs_every_directory_above_it() -> None:
    disk = new_disk()
    inner = disk.create(disk.root, b"d", DIRECTORY, 0)
    disk.create(inner, b"f", FILE, 0)
    disk.sync_directory(inner)
    drop(disk)
    assert disk.root.entries == {}


def test_unsynced_rename_over_a_file_leaves_the_former_file() -> None:
    disk = new_disk()
    old = new_file(disk, b"f", durable=b"old")
    new = disk.create(disk.root, b"tmp", FILE, 0)
    disk.write(new, 0, b"new", 0, durable=False)
    disk.sync_file(new)
    disk.rename(disk.root, b"tmp", disk.root, b"f", replace=True)
    drop(disk)
    assert disk.root.entries == {b"f": old}
    assert contents(disk, old) == b"old"


@pytest.mark.parametrize("seed", SEEDS)
def test_rename_is_atomic_whatever_survives(seed: int) -> None:
    disk = new_disk()
    new_file(disk, b"f", durable=b"old")
    new = disk.create(disk.root, b"tmp", FILE, 0)
    disk.write(new, 0, b"new", 0, durable=False)
    disk.sync_file(new)
    disk.rename(disk.root, b"tmp", disk.root, b"f", replace=True)
    disk.cut(Cut.TORN, random.Random(seed))
    assert contents(disk, disk.root.entries[b"f"]) in (b"old", b"new")
    if contents(disk, disk.root.entries[b"f"]) == b"new":
        assert b"tmp" not in disk.root.entries


def test_rename_between_directories_may_be_half_there_once_one_is_synced() -> None:
    disk = new_disk()
    new_file(disk, b"f", durable=b"x")
    other = disk.create(disk.root, b"d", DIRECTORY, 0)
    disk.sync_directory(disk.root)
    disk.rename(disk.root, b"f", other, b"f", replace=True)
    disk.sync_directory(other)
    drop(disk)
    assert set(disk.root.entries) == {b"d", b"f"}
    assert disk.root.entries[b"f"] is other.entries[b"f"]
    assert other.entries[b"f"].links == 2


def test_torn_cut_leaves_sectors_of_either_time_and_reaches_every_outcome() -> None:
    outcomes = set()
    for seed in SEEDS:
        disk = new_disk()
        node = new_file(disk, durable=b"o" * 2 * PAGE_BYTES)
        disk.write(node, 0, b"n" * 2 * PAGE_BYTES, 0, durable=False)
        disk.cut(Cut.TORN, random.Random(seed))
        data = contents(disk, node)
        sectors = [data[at : at + SECTOR_BYTES] for at in range(0, len(data), SECTOR_BYTES)]
        assert all(sector in (b"o" * SECTOR_BYTES, b"n" * SECTOR_BYTES) for sector in sectors)
        pages = [{sector[:1] for sector in sectors[at : at + 8]} for at in (0, 8)]
        outcomes.add(tuple("torn" if len(page) == 2 else page.pop().decode() for page in pages))
    assert outcomes == {(a, b) for a in ("o", "n", "torn") for b in ("o", "n", "torn")}


def test_torn_cut_reorders_names_and_keeps_the_order_of_one_name() -> None:
    survivors = set()
    for seed in SEEDS:
        disk = new_disk()
        disk.create(disk.root, b"a", FILE, 0)
        disk.create(disk.root, b"b", FILE, 0)
        disk.rename(disk.root, b"b", disk.root, b"c", replace=True)
        disk.cut(Cut.TORN, random.Random(seed))
        survivors.add(tuple(sorted(disk.root.entries)))
    assert survivors == {(), (b"a",), (b"b",), (b"c",), (b"a", b"b"), (b"a", b"c")}


@pytest.mark.parametrize("seed", SEEDS)
def test_synced_state_survives_every_cut(seed: int) -> None:
    rng = random.Random(seed)
    disk = new_disk()
    names = [b"a", b"b", b"c"]
    expected: dict[bytes, bytes] = {}
    for _ in range(30):
        name = rng.choice(names)
        node = disk.root.entries.get(name) or disk.create(disk.root, name, FILE, 0)
        disk.write(node, rng.randrange(20_000), rng.randbytes(rng.randrange(1, 9000)), 0, durable=False)
        if rng.random() < 0.3:
            disk.truncate(node, rng.randrange(20_000), 0)
        if rng.random() < 0.3:
            disk.punch(node, rng.randrange(10_000), rng.randrange(1, 10_000), 0)
        if rng.random() < 0.3:
            disk.rename(disk.root, name, disk.root, rng.choice(names), replace=True)
    for name, node in disk.root.entries.items():
        disk.sync_file(node)
        expected[name] = contents(disk, node)
    disk.sync_directory(disk.root)
    used = disk.used_bytes
    disk.cut(Cut.TORN, rng)
    assert {name: contents(disk, node) for name, node in disk.root.entries.items()} == expected
    assert disk.used_bytes == used == sum(len(n.pages) for n in disk.root.entries.values()) * PAGE_BYTES


def test_space_is_set_aside_and_given_back() -> None:
    disk = new_disk(limit_bytes=10 * PAGE_BYTES)
    node = new_file(disk)
    disk.allocate(node, 0, 8 * PAGE_BYTES, keep_size=False)
    other = disk.create(disk.root, b"g", FILE, 0)
    with pytest.raises(OSError, match="space") as caught:
        disk.write(other, 0, bytes(3 * PAGE_BYTES), 0, durable=False)
    assert caught.value.errno == errno.ENOSPC
    assert other.size_bytes == 0
    disk.write(node, 0, b"x" * 8 * PAGE_BYTES, 0, durable=False)
    disk.opened(node)
    disk.unlink(disk.root, b"f", of_directory=False)
    assert disk.used_bytes == 8 * PAGE_BYTES
    disk.closed(node)
    assert disk.used_bytes == 0
