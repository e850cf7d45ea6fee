"""Makes the golden stores: whole stores of format version 1, as a released program leaves them.

`python -m tests.format.make_store` writes tests/format/golden-stores-v1.tar.xz. It is made once for a version and then
kept: what an earlier program wrote must be read for ever. `clean` was stopped in good order, `killed` is what a kill
left: a log whose end is in an open segment.
"""

import asyncio
import io
import shutil
import tarfile
from pathlib import Path
from typing import Final

from objstore.units import KIB, MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store

ARCHIVE: Final = Path(__file__).parent / "golden-stores-v1.tar.xz"
ZONES: Final = ("a", "b", "c")
LEFT_OUT: Final = ("ballast", "lock")
"""Files that hold no data; the ballast is 32 MiB."""
SETTINGS: Final = StoreSettings(segment_bytes=256 * KIB, recycle_bytes_max=0)
DISK_BYTES: Final = 2 * MIB
ATTRIBUTE: Final = bytes(range(256))


def pattern(seed: int, length_bytes: int) -> bytes:
    """Bytes that no other seed gives."""
    return (seed.to_bytes(4, "little") + bytes(range(1, 253))) * (length_bytes // 256)


def disk_bytes() -> bytes:
    """What `disk` holds."""
    data = bytearray(snapshot_bytes())
    data[64 * KIB : 96 * KIB] = pattern(3, 32 * KIB)
    data[1 * MIB : 1 * MIB + 128 * KIB] = bytes(128 * KIB)
    data[1 * MIB + 512 : 1 * MIB + 1024] = pattern(4, 512)
    return bytes(data)


def snapshot_bytes() -> bytes:
    """What `disk@monday` holds."""
    data = bytearray(DISK_BYTES)
    data[: 640 * KIB] = pattern(1, 640 * KIB)
    data[1 * MIB : 1 * MIB + 256 * KIB] = pattern(2, 256 * KIB)
    return bytes(data)


def clone_bytes() -> bytes:
    """What `clone` holds."""
    data = bytearray(snapshot_bytes())
    data[: 4 * KIB] = pattern(5, 4 * KIB)
    return bytes(data)


async def fill(store: Store) -> None:
    """Everything that the format knows, at least once."""
    await store.create_vdi("disk", DISK_BYTES, copies=2)
    disk = await store.open("disk")
    await disk.write(0, memoryview(pattern(1, 640 * KIB)))
    await disk.write(1 * MIB, memoryview(pattern(2, 256 * KIB)))
    await store.create_snapshot("disk", "monday", protected=True)
    await store.clone("disk@monday", "clone")
    await disk.write(64 * KIB, memoryview(pattern(3, 32 * KIB)), fua=True)
    await disk.trim(1 * MIB, 128 * KIB)
    await disk.write(1 * MIB + 512, memoryview(pattern(4, 512)))
    await disk.flush()
    clone = await store.open("clone")
    await clone.write(0, memoryview(pattern(5, 4 * KIB)))
    await clone.flush()
    await store.close(clone)
    await store.attributes.set("disk", "key", ATTRIBUTE)
    await store.create_vdi("gone", 64 * KIB)
    await store.delete_vdi("gone")


async def make(directory: Path) -> None:
    """`clean` and `killed` in a directory."""
    zones = [directory / "clean" / name for name in ZONES]
    store = await open_store(zones, settings=SETTINGS, create=True)
    await fill(store)
    shutil.copytree(directory / "clean", directory / "killed")
    await store.shutdown()


def main() -> None:
    directory = Path("/tmp/sheepfold-golden")  # it is in the superblocks
    directory.mkdir()
    try:
        asyncio.run(make(directory))
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for path in sorted(directory.rglob("*")):
                if path.name in LEFT_OUT:
                    continue
                entry = tarfile.TarInfo(str(path.relative_to(directory)))
                entry.mode = path.stat().st_mode & 0o7777
                if path.is_dir():
                    entry.type = tarfile.DIRTYPE
                    archive.addfile(entry)
                else:
                    data = path.read_bytes()
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
