"""The commands on what VDIs hold: with a server and without, the same."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli import main
from objstore.units import KIB, MIB
from tests.nbdserver.test_service import runtime, serving

__all__ = ["runtime"]


class Command:
    """`sheepfold` with the zones of one store; stdin and stdout are bytes."""

    def __init__(self, zones: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.zones = [word for zone in zones for word in ("--zone", zone)]
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *words: str, stdin: bytes = b"", code: int = 0) -> bytes:
        """What it printed; fails unless it ends with that exit code."""
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out = io.TextIOWrapper(io.BytesIO())
        self._monkeypatch.setattr("sys.stdout", out)
        self._capfd.readouterr()
        ended = main([*words, *self.zones])
        self.errors = self._capfd.readouterr().err
        assert ended == code, self.errors
        out.flush()
        return out.buffer.getvalue()  # type: ignore[attr-defined]

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture(params=["offline", "attached"])
def sheepfold(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    zones = [str(tmp_path / name) for name in ("a", "b")]
    with serving(tmp_path, zones, "--vdi", "disk:4M") as server:
        server.exports(1)
        if request.param == "offline":
            server.stop()
        yield Command(zones, monkeypatch, capfd)


def test_attributes(sheepfold: Command) -> None:
    sheepfold("vdi", "attr", "set", "disk", "owner", "me")
    sheepfold("vdi", "attr", "set", "disk", "binary", stdin=bytes(range(256)))
    assert sheepfold("vdi", "attr", "get", "disk", "owner") == b"me"
    assert sheepfold("vdi", "attr", "get", "disk", "binary") == bytes(range(256))
    assert sheepfold.json("vdi", "attr", "get", "disk", "owner") == {"name": "owner", "value_base64": "bWU="}
    assert sheepfold("vdi", "attr", "list", "disk") == b"binary\nowner\n"
    assert sheepfold.json("vdi", "attr", "list", "disk") == ["binary", "owner"]
    sheepfold("vdi", "attr", "set", "disk", "owner", "you", "--exclusive", code=4)
    assert "has an attribute 'owner' already" in sheepfold.errors
    assert sheepfold("vdi", "attr", "get", "disk", "owner") == b"me"
    sheepfold("vdi", "attr", "delete", "disk", "owner")
    for words in (("get", "disk", "owner"), ("delete", "disk", "owner"), ("list", "other")):
        sheepfold("vdi", "attr", *words, code=3)
    assert sheepfold("vdi", "attr", "list", "disk") == b"binary\n"


def test_pipes_both_ways(sheepfold: Command) -> None:
    data = random.Random(1).randbytes(3 * MIB) + bytes(100_000) + b"end"
    assert sheepfold("vdi", "upload", "disk", stdin=data) == b"uploaded %d bytes to disk\n" % len(data)
    assert sheepfold("vdi", "download", "disk") == data.ljust(4 * MIB, b"\0")
    assert sheepfold("vdi", "download", "disk", "--offset", "5", "--length", "1M") == data[5 : MIB + 5]
    sheepfold("vdi", "download", "disk", "--offset", "4M", "--length", "1", code=2)
    assert "past the end" in sheepfold.errors
    assert sheepfold("vdi", "download", "disk", "--offset", "4M") == b""


def test_streams_of_the_wrong_length(sheepfold: Command) -> None:
    sheepfold("vdi", "upload", "disk", stdin=b"x" * 10_000)
    sheepfold("vdi", "upload", "disk", "--length", "8K", stdin=b"a" * 5000, code=1)
    assert "after 5000 of 8192 bytes" in sheepfold.errors
    assert sheepfold("vdi", "download", "disk", "--length", "10001") == b"a" * 5000 + b"x" * 5000 + b"\0"
    sheepfold("vdi", "upload", "disk", "--length", "8K", "--zero-rest", stdin=b"b" * 5000)
    assert sheepfold("vdi", "download", "disk", "--length", "9000") == b"b" * 5000 + bytes(3192) + b"x" * 808
    sheepfold("vdi", "upload", "disk", "--offset", "3M", stdin=bytes(MIB) + b"x", code=2)
    assert "longer than the 1048576 bytes" in sheepfold.errors
    sheepfold("vdi", "upload", "other", stdin=b"x", code=3)


def test_files_keep_their_holes(sheepfold: Command, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        file.seek(MIB)
        file.write(b"d" * 64 * KIB)
        file.truncate(4 * MIB)
    done = sheepfold.json("vdi", "upload", "disk", str(source))
    assert done == {"name": "disk", "bytes_done": 4 * MIB}
    assert sheepfold.json("vdi", "map", "disk") == [
        {"offset_bytes": 0, "length_bytes": MIB, "state": "hole"},
        {"offset_bytes": MIB, "length_bytes": 64 * KIB, "state": "data"},
        {"offset_bytes": MIB + 64 * KIB, "length_bytes": 3 * MIB - 64 * KIB, "state": "hole"},
    ]
    assert sheepfold("vdi", "map", "disk", "--offset", "1M", "--length", "8K").split() == [
        b"OFFSET", b"LENGTH", b"STATE", b"1048576", b"8192", b"data",
    ]  # fmt: skip
    copy.write_bytes(b"what is overwritten" * MIB)
    sheepfold("vdi", "download", "disk", str(copy))
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 < MIB
    sheepfold("vdi", "download", "disk", str(tmp_path / "none"), "--offset", "5M", code=2)
    assert not (tmp_path / "none").exists()


def test_a_snapshot_is_downloaded(sheepfold: Command) -> None:
    sheepfold("vdi", "upload", "disk", stdin=b"then")
    sheepfold("vdi", "snapshot", "disk", "monday")
    sheepfold("vdi", "upload", "disk", stdin=b"now!")
    assert sheepfold("vdi", "download", "disk@monday", "--length", "5") == b"then\0"
    assert sheepfold("vdi", "download", "disk", "--length", "5") == b"now!\0"


@pytest.mark.parametrize("append", [False, True])
def test_stdout_that_holds_something_already(sheepfold: Command, tmp_path: Path, append: bool) -> None:
    """A shell's `1<>file` or `>>file`: skipping a hole would leave what is there, or write in the wrong place."""
    sheepfold("vdi", "upload", "disk", stdin=bytes(8192) + b"data")
    path = tmp_path / "out"
    path.write_bytes(b"x" * 20_000)
    with path.open("ab" if append else "r+b") as out:
        command = [sys.executable, "-m", "nbdserver", "vdi", "download", "disk", "--length", "8196", *sheepfold.zones]
        subprocess.run(command, stdout=out, check=True)
    expected = bytes(8192) + b"data"
    assert path.read_bytes() == (b"x" * 20_000 + expected if append else expected + b"x" * (20_000 - 8196))


def test_allocation_and_jobs(sheepfold: Command) -> None:
    sheepfold("vdi", "upload", "disk", stdin=b"x" * 4096)
    done = sheepfold.json("vdi", "allocate", "disk", "--length", "1M")
    assert (done["state"], done["bytes_done"], done["vdi"]) == ("done", MIB, "disk")
    assert [part["state"] for part in sheepfold.json("vdi", "map", "disk")] == ["data", "zero", "hole"]
    assert [job["job_id"] for job in sheepfold.json("job", "list")] == [done["job_id"]]
    assert b"allocate  disk  done" in sheepfold("job", "list")
    assert b"done" in sheepfold("job", "follow", str(done["job_id"]))
    sheepfold("job", "abort", str(done["job_id"]), code=2)
    sheepfold("job", "follow", "99", code=3)
    sheepfold("vdi", "allocate", "disk", "--offset", "5M", "--length", "1", code=2)
    sheepfold("vdi", "allocate", "disk", "--detach")
