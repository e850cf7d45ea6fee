"""FORMAT.md agrees with the encoders: layouts without gaps, sizes, the worked example, the sections that code cites."""

import re
from pathlib import Path

import pytest

from objstore.format import checkpoint, record, segment
from tests.format import make_golden as golden

ROOT = Path(__file__).resolve().parents[2]
FORMAT = (ROOT / "objstore/format/FORMAT.md").read_text()
DESIGN = (ROOT / "objstore/DESIGN.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (\d+) \|", re.MULTILINE)


def layouts() -> dict[bytes, list[tuple[int, int]]]:
    """(offset, size) of the fields of every layout that begins with a magic, by magic."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    for table in re.split(r"\n\n", FORMAT):
        rows = [(int(offset), int(size)) for offset, size in ROW.findall(table)]
        magic = re.search(r"\| magic \| `(\w+)` \|", table)
        if magic:
            found[magic[1].encode()] = rows
    return found


SIZES = {
    segment.HEADER_MAGIC: segment.HEADER.size,
    segment.FOOTER_MAGIC: segment.FOOTER_BYTES,
    record.MAGIC: record.HEADER_BYTES,
    checkpoint.HEADER_MAGIC: checkpoint.HEADER.size,
    checkpoint.FOOTER_MAGIC: checkpoint.FOOTER_BYTES,
}


def test_every_magic_has_its_layout() -> None:
    assert set(layouts()) == set(SIZES)


@pytest.mark.parametrize("magic", sorted(SIZES))
def test_layouts_have_no_gap_and_the_size_of_the_encoder(magic: bytes) -> None:
    end = 0
    for offset, size in layouts()[magic]:
        assert offset == end, f"gap or overlap at {offset}"
        end = offset + size
    assert end == SIZES[magic]


def test_the_worked_example_is_the_golden_record() -> None:
    page = golden.make_segment()[0][4096:]
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} +){16})", FORMAT, re.MULTILINE)
    assert len(lines) == 9
    for offset, text in lines:
        start = int(offset, 16)
        assert page[start : start + 16] == bytes.fromhex(text)


def cited(document: str) -> set[str]:
    """Sections of a document that code names: FORMAT.md, "Record"."""
    found: set[str] = set()
    for path in (ROOT / "objstore").rglob("*.py"):
        text = " ".join(path.read_text().split())
        found.update(re.findall(rf'{document}, "([^"]+)"', text))
    return found


@pytest.mark.parametrize(("document", "text"), [("FORMAT.md", FORMAT), ("DESIGN.md", DESIGN)])
def test_sections_that_code_cites_exist(document: str, text: str) -> None:
    headings = set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    sections = cited(document)
    assert sections
    assert sections <= headings
