"""`vdi diff`: with a server and without, the same."""

import pytest

from nbdserver.cli_diff_arguments import compared
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
