"""The commands on what VDIs hold: with a server and without, the same."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli import main
from tests.nbdserver.test_service import runtime, serving

__all__ = ["runtime"]


class Command:
    """`sheepfold` with the zones of one store; stdin and stdout are bytes."""

    def __init__(self, zones: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._zones = [word for zone in zones for word in ("--zone", zone)]
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *words: str, stdin: bytes = b"", code: int = 0) -> bytes:
        """What it printed; fails unless it ends with that exit code."""
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out = io.TextIOWrapper(io.BytesIO())
        self._monkeypatch.setattr("sys.stdout", out)
        self._capfd.readouterr()
        ended = main([*words, *self._zones])
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
