"""`sheepfold check` on directories: exit codes, text, JSON, locks, repair."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from nbdserver.cli import main
from objstore.units import MIB
from objstore.volume.store import open_store


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHEEPFOLD_CONFIG", raising=False)


@pytest.fixture
def zones(tmp_path: Path) -> list[Path]:
    """A store that was used and closed."""
    paths = [tmp_path / name for name in ("a", "b", "c")]

    async def use() -> None:
        store = await open_store(paths, create=True)
        await store.create_vdi("disk", 8 * MIB, copies=3)
        vdi = await store.open("disk")
        for turn in range(4):
            await vdi.write(turn * MIB, memoryview(bytes([turn + 1]) * MIB))
        await store.close(vdi)
        await store.shutdown()

    asyncio.run(use())
    return paths


def contents(zones: list[Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for zone in zones for path in sorted(zone.rglob("*")) if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def segment(zone: Path) -> Path:
    """The log's largest segment."""
    return max((zone / "log" / "000001").iterdir(), key=lambda path: path.stat().st_size)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * 4096 + 100] ^= 1
    path.write_bytes(data)


def test_clean(capsys: pytest.CaptureFixture[str], zones: list[Path]) -> None:
    before = contents(zones)
    for arguments in (["--zone", str(zones[1])], [word for zone in zones for word in ("--zone", str(zone))]):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].startswith("clean: 1 VDIs")
        assert sum(line.startswith("zone ") for line in out.splitlines()) == 3
    assert contents(zones) == before


def test_config(capsys: pytest.CaptureFixture[str], zones: list[Path], tmp_path: Path) -> None:
    config = tmp_path / "sheepfold.toml"
    config.write_text(f"zones = {[str(zone) for zone in zones]}\n")
    assert run(capsys, "--config", str(config))[0] == 0


def test_faults_and_repair(capsys: pytest.CaptureFixture[str], zones: list[Path]) -> None:
    before = contents(zones)
    bad, gone = segment(zones[0]), segment(zones[2])
    spoil(bad)
    gone.unlink()
    code, out, _ = run(capsys, "--zone", str(zones[0]), "--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (9, "faults")
    found = {(finding["zone"], finding["object"], finding["kind"]) for finding in report["findings"]}
    name = f"log/000001/{bad.name}"
    assert found >= {(str(zones[0]), name, "bad-copy"), (str(zones[2]), name, "missing-copy")}
    assert bad.exists()
    assert not gone.exists()
    code, out, _ = run(capsys, "--zone", str(zones[0]), "--repair")
    assert code == 0
    assert out.count("repair: ") >= 2
    assert {path: data for path, data in contents(zones).items() if path in (bad, gone)} == {
        path: before[path] for path in (bad, gone)
    }
    assert run(capsys, "--zone", str(zones[0]))[0] == 0


def test_damage(capsys: pytest.CaptureFixture[str], zones: list[Path]) -> None:
    for zone in zones:
        spoil(segment(zone))
    code, out, _ = run(capsys, "--zone", str(zones[0]), "--repair")
    assert code == 8
    assert "damage: VDI disk: 1 blocks of data are in no copy" in out


def test_missing_zones(capsys: pytest.CaptureFixture[str], zones: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(zones[1])
    code, out, _ = run(capsys, *[word for zone in zones for word in ("--zone", str(zone))])
    assert code == 9
    assert f"missing  {zones[1]}" in out
    assert run(capsys, "--zone", str(zones[0]))[0] == 9
    for arguments, expected in ((["--zone", str(tmp_path / "none")], 7), (["--zone", str(tmp_path)], 3), ([], 2)):
        assert main(["check", *arguments]) == expected
        assert capsys.readouterr().err.startswith("sheepfold: error: ")


def test_a_store_in_use_is_left_alone(capsys: pytest.CaptureFixture[str], zones: list[Path]) -> None:
    async def in_use() -> int:
        store = await open_store(zones, lock_note='{"pid":4711}')
        try:
            return await asyncio.to_thread(main, ["check", "--zone", str(zones[0])])
        finally:
            await store.shutdown()

    assert asyncio.run(in_use()) == 5
    assert "in use by process 4711" in capsys.readouterr().err


def test_leftovers_are_counted_and_listed_on_request(capsys: pytest.CaptureFixture[str], zones: list[Path]) -> None:
    left = zones[0] / "log" / "000001" / "0000fff"
    shutil.copy(segment(zones[0]), left)
    code, out, _ = run(capsys, "--zone", str(zones[0]))
    assert code == 0
    assert "leftovers" in out
    assert left.name not in out
    code, out, _ = run(capsys, "--zone", str(zones[0]), "--verbose")
    assert code == 0
    assert left.name in out
    assert run(capsys, "--zone", str(zones[0]), "--repair")[0] == 0
    assert not left.exists()
