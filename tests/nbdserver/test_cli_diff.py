"""`vdi diff`: with a server and without, the same."""

from pathlib import Path

import pytest

from nbdserver.cli_diff_arguments import compared, exported
from objstore.errors import InvalidRequest
from objstore.units import KIB
from tests.nbdserver.test_cli_library import Command, runtime, sheepfold

__all__ = ["runtime", "sheepfold"]


def test_what_has_changed(sheepfold: Command) -> None:
    sheepfold("vdi", "upload", "disk", stdin=b"a" * 64 * KIB)
    sheepfold("vdi", "snapshot", "disk", "monday")
    sheepfold("vdi", "upload", "disk", "--offset", "8K", stdin=b"b" * 5000 + bytes(8 * KIB))
    sheepfold("vdi", "snapshot", "disk", "tuesday")
    sheepfold("vdi", "upload", "disk", "--offset", "1M", stdin=b"c")
    changed = [
        {"offset_bytes": 8 * KIB, "length_bytes": 8 * KIB, "state": "data"},
        {"offset_bytes": 16 * KIB, "length_bytes": 4 * KIB, "state": "hole"},
        {"offset_bytes": 20 * KIB, "length_bytes": 4 * KIB, "state": "data"},
    ]
    assert sheepfold.json("vdi", "diff", "disk@monday..tuesday") == changed
    assert sheepfold.json("vdi", "diff", "disk@1..disk@2") == changed
    last = [{"offset_bytes": 1 << 20, "length_bytes": 4 * KIB, "state": "data"}]
    assert sheepfold.json("vdi", "diff", "disk@tuesday") == last
    assert sheepfold.json("vdi", "diff", "disk@monday..") == changed + last
    assert sheepfold("vdi", "diff", "disk@tuesday..").split() == [
        b"OFFSET", b"LENGTH", b"STATE", b"1048576", b"4096", b"data",
    ]  # fmt: skip
    sheepfold("vdi", "clone", "disk@tuesday", "clone")
    sheepfold("vdi", "snapshot", "clone", "s")
    assert sheepfold.json("vdi", "diff", "disk@tuesday..clone@s") == []
    assert sheepfold.json("vdi", "diff", "disk@monday..clone@s") == changed
    sheepfold("vdi", "diff", "disk@sunday", code=3)
    assert sheepfold.json("vdi", "diff", "disk@tuesday..tuesday") == []


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("d@a", ("d@a", "d")),
        ("d@a..", ("d@a", "d")),
        ("d@a..b", ("d@a", "d@b")),
        ("d@a..3", ("d@a", "d@3")),
        ("d@1..e@2", ("d@1", "e@2")),
        ("d..x@a..b..c@t", None),
        ("d..x@a..c@t", ("d..x@a", "c@t")),
        ("d@v1.0..v1.1", ("d@v1.0", "d@v1.1")),
    ],
)
def test_ranges(text: str, pair: tuple[str, str] | None) -> None:
    if pair is None:
        with pytest.raises(InvalidRequest, match="is not NAME@FROM"):
            compared(text)
    else:
        assert compared(text) == pair


@pytest.mark.parametrize("text", ["", "d", "@a", "..", "d..e", "d@..a", "d@a..b@", "a/b@c"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not NAME@FROM"):
        compared(text)


def test_a_disk_and_what_has_changed_of_it_go_elsewhere(sheepfold: Command, tmp_path: Path) -> None:
    sheepfold("vdi", "upload", "disk", stdin=b"a" * 64 * KIB)
    sheepfold("vdi", "snapshot", "disk", "monday")
    sheepfold("vdi", "upload", "disk", "--offset", "8K", stdin=b"b" * 5000)
    sheepfold("vdi", "snapshot", "disk", "tuesday")
    whole = sheepfold("vdi", "export-diff", "..disk@monday")
    sheepfold("vdi", "export-diff", "disk@monday..tuesday", str(tmp_path / "diff"))
    assert (tmp_path / "diff").stat().st_size < 10_000
    assert sheepfold("vdi", "import-diff", "--name", "copy", "--tag", "first", stdin=whole) == b"imported copy@first\n"
    sheepfold("vdi", "import-diff", "--name", "copy", stdin=whole, code=4)
    sheepfold("vdi", "import-diff", "--name", "copy", stdin=(tmp_path / "diff").read_bytes()[:-40], code=8)
    assert "before its end" in sheepfold.errors
    sheepfold("vdi", "download", "copy", code=5)
    assert "half of what is imported" in sheepfold.errors
    (copy,) = [vdi for vdi in sheepfold.json("vdi", "list") if vdi["name"] == "copy"]
    assert copy["importing"]
    assert b"importing" in sheepfold("vdi", "list")
    made = sheepfold.json("vdi", "import-diff", str(tmp_path / "diff"), "--name", "copy")
    assert made["name"] == "copy@tuesday"
    assert sheepfold("vdi", "download", "copy") == sheepfold("vdi", "download", "disk@tuesday")
    assert sheepfold("vdi", "download", "copy@first") == sheepfold("vdi", "download", "disk@monday")
    sheepfold("vdi", "import-diff", "--name", "none", str(tmp_path / "diff"), code=3)
    sheepfold("vdi", "import-diff", stdin=b"nonsense", code=8)
    sheepfold("vdi", "export-diff", "disk@monday..sunday", str(tmp_path / "none"), code=3)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["disk@a", "disk@a..", "..disk", "..@a", ".."])
def test_what_can_not_be_exported(text: str) -> None:
    with pytest.raises(InvalidRequest):
        exported(text)


def test_what_is_exported() -> None:
    assert exported("..disk@a") == ("", "disk@a")
    assert exported("disk@a..b") == ("disk@a", "disk@b")
