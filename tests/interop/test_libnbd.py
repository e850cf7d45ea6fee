"""libnbd's tools as clients: nbdinfo, nbdcopy, nbdsh."""

import json
import random
from pathlib import Path

import pytest

from tests.interop.conftest import IMAGE_BYTES, Export
from tests.support.clients import run
from tests.support.serving import MIB

HOLE = "hole,zero"


async def test_nbdinfo_json(export: Export) -> None:
    """What libnbd learns in the handshake: size, name, every flag, block sizes, the context."""
    said = json.loads((await run("nbdinfo", "--json", export.uri())).out)
    assert said["protocol"] == "newstyle-fixed"
    assert said["structured"] is True
    (disk,) = said["exports"]
    assert disk["export-size"] == IMAGE_BYTES
    assert disk["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert not disk["is_read_only"]
    for flag in ("df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero", "cache"):
        assert disk[f"can_{flag}"] is True, flag
    sizes = (disk["block_size_minimum"], disk["block_size_preferred"], disk["block_size_maximum"])
    assert sizes == (1, 4096, 32 * MIB)


async def test_nbdinfo_by_name(export: Export) -> None:
    """An export is found by its name; another name is refused with the server's words."""
    assert (await run("nbdinfo", "--size", export.uri("disk"))).out.strip() == str(IMAGE_BYTES)
    refused = await run("nbdinfo", "--size", export.uri("nobody"), check=False)
    assert refused.code != 0
    assert "nobody" in refused.err


async def test_nbdinfo_list(export: Export) -> None:
    """NBD_OPT_LIST, and NBD_OPT_INFO for each entry of it."""
    said = json.loads((await run("nbdinfo", "--list", "--json", export.uri())).out)
    assert [(disk["export-name"], disk["export-size"]) for disk in said["exports"]] == [("disk", IMAGE_BYTES)]
    assert 'export="disk"' in (await run("nbdinfo", "--list", export.uri())).out


async def test_nbdinfo_map(export: Export, tmp_path: Path) -> None:
    """Block status of a disk with data at both ends."""
    await run(
        "nbdsh", "-u", export.uri(), "-c", f"h.pwrite(b'x' * 4096, 0); h.pwrite(b'y' * 8192, {IMAGE_BYTES - 8192})"
    )
    extents = json.loads((await run("nbdinfo", "--map", "--json", export.uri())).out)
    found = [(extent["offset"], extent["length"], extent["description"]) for extent in extents]
    assert found == [
        (0, 4096, "data"),
        (4096, IMAGE_BYTES - 3 * 4096, HOLE),
        (IMAGE_BYTES - 8192, 8192, "data"),
    ]


def sparse_image(path: Path) -> bytes:
    """A file with data, zeros and holes."""
    dice = random.Random(11)
    image = bytearray(IMAGE_BYTES)
    for offset in (0, 5 * MIB + 4096, 17 * MIB + 512, 40 * MIB, IMAGE_BYTES - 70_000):
        image[offset : offset + 70_000] = dice.randbytes(70_000)
    image[30 * MIB : 34 * MIB] = dice.randbytes(4 * MIB)
    path.write_bytes(image)
    return bytes(image)


@pytest.mark.parametrize(
    "options",
    [[], ["--connections=1", "--requests=1"], ["--connections=4", "--requests=64", "--flush"], ["--synchronous"]],
    ids=["default", "one by one", "four connections", "synchronous"],
)
async def test_nbdcopy_both_ways(export: Export, tmp_path: Path, options: list[str]) -> None:
    """A file copied in and out again is the same, with any number of connections."""
    source, back = tmp_path / "source.img", tmp_path / "back.img"
    image = sparse_image(source)
    await run("nbdcopy", *options, source, export.uri())
    await run("nbdcopy", *options, export.uri(), back)
    assert back.read_bytes() == image


async def test_nbdcopy_destination_is_zero(export: Export, tmp_path: Path) -> None:
    """nbdcopy over old contents: what is zero in the source is zeroed at the destination."""
    source, back = tmp_path / "source.img", tmp_path / "back.img"
    image = sparse_image(source)
    await run("nbdsh", "-u", export.uri(), "-c", "h.pwrite(b'old' * 1000000, 9 * 1024 * 1024)")
    await run("nbdcopy", "--allocated", source, export.uri())
    await run("nbdcopy", export.uri(), back)
    assert back.read_bytes() == image


NBDSH_SCRIPT = """
assert h.get_size() == {size}
assert h.get_structured_replies_negotiated()
h.pwrite(b'a' * 10000, 100)
assert h.pread(10000, 100) == b'a' * 10000
h.pwrite(b'f' * 512, 20000, nbd.CMD_FLAG_FUA)
h.zero(512, 20000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(512, 20000) == bytearray(512)
h.pwrite(b't' * 16384, 65536)
h.trim(8192, 65536)
assert h.pread(16384, 65536) == bytearray(8192) + b't' * 8192
h.zero({size}, 0, nbd.CMD_FLAG_FAST_ZERO)
h.cache(1 << 20, 0)
h.flush()
entries = []
def extent(context, offset, found, error):
    entries.extend(found)
h.pwrite(b'd' * 4096, 8192)
h.block_status(1 << 20, 0, extent)
assert entries[:4] == [8192, 3, 4096, 0], entries
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
data = h.pread_structured(65536, 0, chunk)
assert data == bytearray(8192) + b'd' * 4096 + bytearray(65536 - 12288)
assert sum(length for _, length, _ in chunks) == 65536
try:
    h.set_strict_mode(0)
    h.pwrite(b'x' * 1024, {size} - 512)
except nbd.Error as error:
    assert error.errno == 'ENOSPC', error.errno
else:
    raise AssertionError('a write past the end succeeded')
cookies = [h.aio_pread(nbd.Buffer(65536), index * 65536) for index in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
h.shutdown()
"""


async def test_nbdsh_script(export: Export) -> None:
    """libnbd checks each reply itself: commands with flags, structured reads, status, errors, many in flight."""
    script = NBDSH_SCRIPT.format(size=IMAGE_BYTES)
    await run("nbdsh", "--base-allocation", "-u", export.uri(), "-c", "-", stdin=script)


async def test_nbdsh_negotiates_step_by_step(export: Export) -> None:
    """Option by option: list, info, contexts, go, and abort on another connection."""
    script = """
names = []
h.set_opt_mode(True)
h.set_full_info(True)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.opt_list(lambda name, description: names.append(name)) == 1
assert names == ['disk']
found = []
h.opt_list_meta_context(lambda name: found.append(name))
assert found == ['base:allocation'], found
h.set_export_name('nobody')
try:
    h.opt_info()
except nbd.Error:
    pass
else:
    raise AssertionError('an unknown export was described')
h.set_export_name('disk')
h.opt_info()
assert h.get_canonical_export_name() == 'disk'
h.opt_go()
assert h.can_meta_context('base:allocation')
h.shutdown()
"""
    await run("nbdsh", "-c", f"uri = {export.uri()!r}", "-c", "-", stdin=script)
