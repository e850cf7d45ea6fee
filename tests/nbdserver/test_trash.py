"""The trash from the outside: commands against a running server and without one."""

from pathlib import Path
from typing import Any

import pytest

from tests.nbdserver.test_service import fails, runtime, serving, sheepfold, zones

__all__ = ["runtime", "zones"]


def test_delete_undelete_purge(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "sheepfold.toml"
    config.write_text(f"zones = {zones}\n[store]\ntrash_days = 2.0\n")

    def ask(*arguments: str) -> Any:
        return sheepfold(capsys, *arguments, "--config", str(config))

    with serving(tmp_path, zones, "--config", str(config), "--vdi", "disk:1M") as server:
        server.exports(1)
        assert ask("vdi", "delete", "disk") == {"deleted": "disk"}
        assert ask("vdi", "list") == []
        (entry,) = ask("trash")
        assert (entry["name"], entry["size_bytes"]) == ("disk", 1 << 20)
        assert ask("vdi", "undelete", "disk", "again")["name"] == "again"
        assert ask("trash") == []
        assert fails(capsys, "vdi", "undelete", "disk", "--config", str(config))[0] == 3
        assert ask("vdi", "delete", "again") == {"deleted": "again"}
        assert server.stop() == (0, "")

    # The trash of a store that nobody serves; what deletes here is the command, with its own configuration.
    (entry,) = ask("trash")
    number = str(entry["vdi_id"])
    assert ask("vdi", "undelete", "again", "disk", "--id", number)["name"] == "disk"
    assert ask("vdi", "delete", "disk") == {"deleted": "disk"}
    assert ask("vdi", "purge", "disk", "--id", number) == {"deleted": "disk"}
    assert ask("trash") == []


def test_what_people_see(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from nbdserver.cli import main

    config = tmp_path / "sheepfold.toml"
    config.write_text(f"zones = {zones}\n[store]\ntrash_days = 2.0\n")
    with serving(tmp_path, zones, "--config", str(config), "--vdi", "disk:1M") as server:
        server.exports(1)
        for arguments, words in (
            (["vdi", "delete", "disk"], ["deleted disk"]),
            (["trash"], ["NAME", "KEPT UNTIL", "disk", "1M"]),
            (["vdi", "purge", "disk"], ["deleted disk for good"]),
            (["trash"], ["NAME"]),
        ):
            assert main([*arguments, "--config", str(config)]) == 0
            shown = capsys.readouterr().out
            assert all(word in shown for word in words), shown
