"""qemu-img and qemu-io as clients, with a disk image that holds a real file system."""

import json
import random
from pathlib import Path

import pytest

from tests.interop.conftest import IMAGE_BYTES, Export
from tests.support.clients import run
from tests.support.serving import MIB


async def file_system_image(directory: Path) -> Path:
    """A raw image of an ext4 file system that holds some hundred files."""
    dice = random.Random(13)
    tree = directory / "tree"
    for branch in range(8):
        (tree / f"branch{branch}").mkdir(parents=True)
        for leaf in range(30):
            (tree / f"branch{branch}" / f"leaf{leaf}").write_bytes(dice.randbytes(dice.randrange(30_000)))
    (tree / "large").write_bytes(dice.randbytes(9 * MIB))
    (tree / "sparse").write_bytes(bytes(3 * MIB) + b"end")
    image = directory / "image.raw"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    await run("mkfs.ext4", "-q", "-F", "-d", tree, image)
    return image


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"]], ids=["in order", "out of order"])
async def test_convert_and_compare(export: Export, tmp_path: Path, options: list[str]) -> None:
    """A disk image converted in, compared, converted out: the same, and its file system is clean."""
    image, back = await file_system_image(tmp_path), tmp_path / "back.raw"
    await run("qemu-img", "convert", "-n", *options, "-f", "raw", "-O", "raw", image, export.uri())
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, export.uri())
    await run("qemu-img", "convert", *options, "-f", "raw", "-O", "raw", export.uri(), back)
    assert back.read_bytes() == image.read_bytes()
    await run("e2fsck", "-f", "-n", back)


async def test_qcow2_inside_the_export(export: Export, tmp_path: Path) -> None:
    """A format with its own metadata on top of the export: many small writes with flushes between."""
    image = await file_system_image(tmp_path)
    await run("qemu-img", "create", "-q", "-f", "qcow2", export.uri(), "32M")
    pattern = ["-c", "write -P 0x5a 1M 2M", "-c", "write -z 2M 64k", "-c", "flush"]
    await run("qemu-io", "-f", "qcow2", *pattern, export.uri())
    await run("qemu-img", "check", "-f", "qcow2", export.uri())
    out = await run("qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 0 2M 64k", export.uri())
    assert "Pattern verification failed" not in out.out
    assert image.exists()


async def test_qemu_img_info_and_map(export: Export) -> None:
    """Size and block status as qemu sees them."""
    info = json.loads((await run("qemu-img", "info", "--output=json", "-f", "raw", export.uri())).out)
    assert info["virtual-size"] == IMAGE_BYTES
    await run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", export.uri())
    extents = json.loads((await run("qemu-img", "map", "--output=json", "-f", "raw", export.uri())).out)
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data == [(65536, 131072)]
    assert all(extent["zero"] for extent in extents if not extent["data"])


async def io(export: Export, *commands: str) -> str:
    """Run qemu-io commands; a pattern that does not match or a failed request fails the test."""
    arguments = [word for command in commands for word in ("-c", command)]
    finished = await run("qemu-io", "-f", "raw", *arguments, export.uri())
    assert "verification failed" not in finished.out, finished.out
    assert "failed" not in finished.out + finished.err, finished.out + finished.err
    return finished.out


async def test_qemu_io_patterns(export: Export) -> None:
    """Writes with and without FUA, zeroes with and without unmap, discards, flushes, read back with their pattern."""
    await io(
        export,
        "write -P 0x11 0 1M",
        "write -P 0x22 -f 1M 64k",
        "write -P 0x33 1000 3333",
        "read -P 0x11 0 1000",
        "read -P 0x33 1000 3333",
        "read -P 0x11 4333 1044243",
        "read -P 0x22 1M 64k",
        "write -z 256k 128k",
        "read -P 0 256k 128k",
        "write -z -u 512k 128k",
        "read -P 0 512k 128k",
        "write -z -f 700k 1k",
        "read -P 0 700k 1k",
        "read -P 0x11 701k 10k",
        "discard 0 64k",
        "read -P 0 0 64k",
        "read -P 0x11 64k 64k",
        "flush",
    )
    await io(export, "read -P 0x11 64k 64k", "read -P 0 512k 128k")


async def test_qemu_io_large_and_unaligned(export: Export) -> None:
    """The largest requests that qemu sends, and ends that fall inside of blocks."""
    await io(export, "write -P 0x44 1 33554431", "read -P 0x44 1 33554431", "read -P 0 0 1")
    await io(export, "aio_write -P 0x55 40M 4M", "aio_write -P 0x56 44M 4M", "aio_flush", "read -P 0x55 40M 4M")


async def test_qemu_io_aio(export: Export) -> None:
    """Many requests of qemu in flight at once."""
    writes = [f"aio_write -q -P {index + 1} {index * 256}k 256k" for index in range(64)]
    reads = [f"read -q -P {index + 1} {index * 256}k 256k" for index in range(64)]
    await io(export, *writes, "aio_flush", *reads)
