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
