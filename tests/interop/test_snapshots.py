"""Real clients on the export of a snapshot."""

import json
from pathlib import Path

import pytest

from nbdserver.cli import main
from tests.nbdserver.test_service import runtime, serving, zones
from tests.support.clients import run
from tests.support.serving import MIB

__all__ = ["runtime", "zones"]


async def test_nbdinfo_nbdcopy_and_qemu_img_on_a_snapshot(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        socket = server.address.removeprefix("unix://")
        disk, snapshot = (f"nbd+unix:///{name}?socket={socket}" for name in ("disk", "disk@s"))
        await run("nbdsh", "-u", disk, "-c", f"h.pwrite(b'x' * {MIB}, {MIB}); h.flush()")
        assert main(["vdi", "snapshot", "disk", "s", "--zone", zones[0]]) == 0
        capsys.readouterr()
        await run("nbdsh", "-u", disk, "-c", f"h.pwrite(b'y' * {2 * MIB}, 0); h.flush()")

        (said,) = json.loads((await run("nbdinfo", "--json", snapshot)).out)["exports"]
        assert (said["export-size"], said["is_read_only"]) == (16 * MIB, True)
        extents = json.loads((await run("nbdinfo", "--map", "--json", snapshot)).out)
        found = [(extent["offset"], extent["length"], extent["description"]) for extent in extents]
        assert found == [(0, MIB, "hole,zero"), (MIB, MIB, "data"), (2 * MIB, 14 * MIB, "hole,zero")]

        image = bytes(MIB) + b"x" * MIB + bytes(14 * MIB)
        copied, converted = tmp_path / "copied", tmp_path / "converted"
        await run("nbdcopy", snapshot, str(copied))
        assert copied.read_bytes() == image
        await run("qemu-img", "convert", "-f", "raw", "-O", "raw", snapshot, str(converted))
        assert converted.read_bytes() == image
        refused = await run("nbdcopy", str(copied), snapshot, check=False)
        assert refused.code != 0
        assert (await run("nbdsh", "-u", disk, "-c", f"assert h.pread({MIB}, {MIB}) == b'y' * {MIB}")).code == 0


async def test_changed_blocks_for_nbdinfo_nbdsh_and_qemu_img(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        socket = server.address.removeprefix("unix://")
        disk, later = (f"nbd+unix:///{name}?socket={socket}" for name in ("disk", "disk@two"))
        await run("nbdsh", "-u", disk, "-c", f"h.pwrite(b'x' * {4 * MIB}, 0); h.flush()")
        assert main(["vdi", "snapshot", "disk", "one", "--zone", zones[0]]) == 0
        await run("nbdsh", "-u", disk, "-c", f"h.pwrite(b'y' * {MIB}, {MIB}); h.zero({MIB}, {3 * MIB}); h.flush()")
        assert main(["vdi", "snapshot", "disk", "two", "--zone", zones[0]]) == 0
        await run("nbdsh", "-u", disk, "-c", f"h.pwrite(b'z' * {MIB}, {8 * MIB}); h.flush()")
        assert main(["vdi", "clone", "disk@two", "clone", "--zone", zones[0]]) == 0
        capsys.readouterr()

        listed = json.loads((await run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={socket}")).out)["exports"]
        contexts = {each["export-name"]: each["contexts"] for each in listed}
        assert {"qemu:dirty-bitmap:one", "x-sheepfold:changed:two", "qemu:allocation-depth"} <= set(contexts["disk"])

        async def bitmap(uri: str, context: str) -> list[tuple[int, int, int]]:
            said = json.loads((await run("nbdinfo", f"--map={context}", "--json", uri)).out)
            return [(each["offset"], each["length"], each["type"]) for each in said]

        since_one = [(0, MIB, 0), (MIB, MIB, 1), (2 * MIB, MIB, 0), (3 * MIB, MIB, 1), (4 * MIB, 12 * MIB, 0)]
        assert await bitmap(later, "qemu:dirty-bitmap:one") == since_one
        assert await bitmap(disk, "qemu:dirty-bitmap:two") == [
            (0, 8 * MIB, 0),
            (8 * MIB, MIB, 1),
            (9 * MIB, 7 * MIB, 0),
        ]
        zeroed = [(0, MIB, 0), (MIB, MIB, 1), (2 * MIB, MIB, 0), (3 * MIB, MIB, 7), (4 * MIB, 12 * MIB, 0)]
        assert await bitmap(later, "x-sheepfold:changed:one") == zeroed
        clone = f"nbd+unix:///clone?socket={socket}"
        await run("nbdsh", "-u", clone, "-c", f"h.pwrite(b'c' * {MIB}, 0); h.flush()")
        assert await bitmap(clone, "qemu:allocation-depth") == [(0, MIB, 1), (MIB, 2 * MIB, 2), (3 * MIB, 13 * MIB, 0)]

        script = f"""
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:one")
h.connect_uri("{disk}")
found = {{}}
def extent(context, offset, entries, error):
    found[context] = list(entries)
h.block_status({4 * MIB}, 0, extent)
assert found["base:allocation"] == [{3 * MIB}, 0, {MIB}, 3], found
assert found["qemu:dirty-bitmap:one"] == [{MIB}, 0, {MIB}, 1, {MIB}, 0, {MIB}, 1], found
"""
        await run("nbdsh", "-c", script)

        # qemu calls what is dirty "not data" when it maps a bitmap.
        options = f"driver=nbd,export=disk,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:two"
        said = json.loads((await run("qemu-img", "map", "--output=json", "--image-opts", options)).out)
        assert [(each["start"], each["length"]) for each in said if not each["data"]] == [(8 * MIB, MIB)]
