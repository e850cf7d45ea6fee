"""Damaged, misplaced and newer bytes are refused, by FormatError and nothing else."""

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objstore.errors import FormatError, NewerFormat
from objstore.format.catalog import decode_entry, decode_snapshot
from objstore.format.checkpoint import (
    FOOTER_BYTES as CHECKPOINT_FOOTER_BYTES,
)
from objstore.format.checkpoint import (
    ROOT,
    TABLE,
    Footer,
    decode_checkpoint_header,
    decode_footer,
    decode_frame,
    decode_root,
    decode_table,
)
from objstore.format.document import Epoch, Superblock, decode_document
from objstore.format.record import decode_header
from objstore.format.segment import (
    FOOTER_BYTES,
    decode_directory,
    decode_segment_header,
)
from objstore.format.segment import decode_footer as decode_segment_footer
from objstore.log.regions import decode_region
from objstore.units import BLOCK_BYTES
from tests.format import make_golden as golden

FILES = golden.make_all()
SEGMENT = FILES["segment"]
CHECKPOINT = FILES["checkpoint"]
OTHER_STORE = bytes(16)
FLIPS_MAX = 400

Decode = Callable[[bytes], object]


def segment_seal(data: bytes, *, store_id: bytes = golden.STORE_ID, log: int = 3, segment: int = 42) -> object:
    """Footer and directory together, as one reader takes them; a footer that is none counts as refused."""
    footer = decode_segment_footer(data[-FOOTER_BYTES:], store_id=store_id, log=log, segment=segment)
    if footer is None or footer.table_bytes + FOOTER_BYTES > len(data):
        raise FormatError("not sealed")
    return decode_directory(footer, data[-FOOTER_BYTES - footer.table_bytes : -FOOTER_BYTES], log=log, segment=segment)


def checkpoint_end(data: bytes, *, store_id: bytes = golden.STORE_ID, log: int = 3, number: int = 9) -> object:
    """Root, segment table and footer of the golden checkpoint, given from its root on."""
    footer = decode_footer(data[-CHECKPOINT_FOOTER_BYTES:], store_id=store_id, log=log, number=number)
    start = len(CHECKPOINT) - len(data)
    root, table = footer.root_offset - start, footer.table_offset - start
    decode_root(data[root : root + footer.root_count * ROOT.itemsize], footer)
    decode_table(data[table : table + footer.table_count * TABLE.itemsize], footer)
    return footer


def _footer() -> Footer:
    return decode_footer(CHECKPOINT[-CHECKPOINT_FOOTER_BYTES:], store_id=golden.STORE_ID, log=3, number=9)


SEAL = SEGMENT[-FOOTER_BYTES - 164 :]
FRAME_AT = BLOCK_BYTES
FRAME = CHECKPOINT[FRAME_AT : FRAME_AT + 12 + 16]

WHOLE: dict[str, tuple[bytes, Decode]] = {
    "segment header": (
        SEGMENT[:BLOCK_BYTES],
        lambda data: decode_segment_header(data, store_id=golden.STORE_ID, log=3, segment=42),
    ),
    "record header": (
        SEGMENT[BLOCK_BYTES : 2 * BLOCK_BYTES],
        lambda data: decode_header(data, store_id=golden.STORE_ID, log=3, segment=42, block=1),
    ),
    "directory and footer": (SEAL, segment_seal),
    "checkpoint header": (
        CHECKPOINT[:BLOCK_BYTES],
        lambda data: decode_checkpoint_header(data, store_id=golden.STORE_ID, log=3, number=9),
    ),
    "map frame": (
        FRAME,
        lambda data: decode_frame(data, store_id=golden.STORE_ID, log=3, number=9, region=0),
    ),
    "checkpoint end": (CHECKPOINT[_footer().root_offset :], checkpoint_end),
    "catalog snapshot": (
        FILES["catalog-snapshot"],
        lambda data: decode_snapshot(data, golden.STORE_ID, 6),
    ),
    "superblock": (
        FILES["superblock"],
        lambda data: decode_document("superblock", data, Superblock, "here"),
    ),
    "epoch": (FILES["epoch"], lambda data: decode_document("epoch", data, Epoch, "here")),
}
NOT_COVERED = {"superblock": 1, "epoch": 1}
"""Bytes at the end that no checksum covers: a document's last newline."""


def flips(data: bytes, uncovered: int) -> Iterator[bytes]:
    """The data with one bit turned over: every bit, or a sample that has the first and last 64 bytes' bits."""
    bits = (len(data) - uncovered) * 8
    chosen = range(bits)
    sample = set(chosen) if bits <= FLIPS_MAX else {*chosen[: 64 * 8], *chosen[-64 * 8 :]}
    sample.update(random.Random(len(data)).sample(chosen, min(bits, FLIPS_MAX)))
    for bit in sorted(sample):
        flipped = bytearray(data)
        flipped[bit >> 3] ^= 1 << (bit & 7)
        yield bytes(flipped)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_flipped_bit_is_refused(name: str) -> None:
    data, decode = WHOLE[name]
    decode(data)
    for flipped in flips(data, NOT_COVERED.get(name, 0)):
        with pytest.raises(FormatError):
            decode(flipped)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_shorter_file_is_refused(name: str) -> None:
    data, decode = WHOLE[name]
    for length in {0, 1, 7, 8, 20, 24, len(data) // 2, len(data) - 2}:
        if length < len(data):
            with pytest.raises(FormatError):
                decode(data[:length])


@given(st.data())
def test_random_bytes_are_refused(data: st.DataObject) -> None:
    """Also behind a right magic, and in the middle of right bytes."""
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    whole, decode = WHOLE[name]
    noise = data.draw(st.binary(max_size=300))
    how = data.draw(st.integers(0, 3))
    at = data.draw(st.integers(0, len(whole)))
    changed = [noise, whole[:8] + noise, noise.ljust(len(whole), b"\0"), whole[:at] + noise + whole[at + len(noise) :]]
    if changed[how] == whole:
        return
    try:
        decode(changed[how])
    except FormatError:
        pass
    else:
        assert changed[how].rstrip(b"\n") == whole.rstrip(b"\n") or name in NOT_COVERED


@given(st.binary(max_size=200))
def test_random_entries_are_refused_or_entries(data: bytes) -> None:
    try:
        decode_entry(data, len(data))
    except FormatError:
        pass


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 1100))
def test_random_map_pages_are_refused_or_pages(data: bytes, form: int, count: int) -> None:
    for page in (data, bytes([form, 0]) + count.to_bytes(2, "little") + bytes(4) + data):
        try:
            decode_region(page)
        except FormatError:
            pass


@pytest.mark.parametrize(
    "identity",
    [
        {"store_id": OTHER_STORE, "log": 3, "segment": 42},
        {"store_id": golden.STORE_ID, "log": 4, "segment": 42},
        {"store_id": golden.STORE_ID, "log": 3, "segment": 43},
    ],
)
def test_segments_of_another_place(identity: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="another place"):
        decode_segment_header(SEGMENT[:BLOCK_BYTES], **identity)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="another place"):
        decode_header(SEGMENT[BLOCK_BYTES : 2 * BLOCK_BYTES], block=1, **identity)  # type: ignore[arg-type]
    assert decode_segment_footer(SEGMENT[-FOOTER_BYTES:], **identity) is None  # type: ignore[arg-type]


def test_a_record_of_another_block() -> None:
    with pytest.raises(FormatError, match="another place"):
        decode_header(SEGMENT[BLOCK_BYTES : 2 * BLOCK_BYTES], store_id=golden.STORE_ID, log=3, segment=42, block=4)


@pytest.mark.parametrize(
    ("store_id", "log", "number"), [(OTHER_STORE, 3, 9), (golden.STORE_ID, 2, 9), (golden.STORE_ID, 3, 8)]
)
def test_checkpoints_of_another_place(store_id: bytes, log: int, number: int) -> None:
    with pytest.raises(FormatError):
        decode_checkpoint_header(CHECKPOINT[:BLOCK_BYTES], store_id=store_id, log=log, number=number)
    with pytest.raises(FormatError):
        decode_footer(CHECKPOINT[-CHECKPOINT_FOOTER_BYTES:], store_id=store_id, log=log, number=number)
    with pytest.raises(FormatError):
        decode_frame(FRAME, store_id=store_id, log=log, number=number, region=0)


def test_a_map_frame_of_another_region() -> None:
    for region in (1, 1 << 32):
        with pytest.raises(FormatError):
            decode_frame(FRAME, store_id=golden.STORE_ID, log=3, number=9, region=region)


def test_catalog_snapshots_of_another_place() -> None:
    for store_id, number in ((OTHER_STORE, 6), (golden.STORE_ID, 7)):
        with pytest.raises(FormatError, match="not catalog snapshot"):
            decode_snapshot(FILES["catalog-snapshot"], store_id, number)


def test_a_document_of_another_kind() -> None:
    with pytest.raises(FormatError, match="/z/epoch is no epoch of Sheepfold"):
        decode_document("epoch", FILES["superblock"], Epoch, "/z/epoch")


@pytest.mark.parametrize("version", ["2", "999999999"])
def test_a_newer_version_is_refused_naming_both(version: str) -> None:
    newer = FILES["superblock"].replace(b"superblock 1 ", b"superblock %s " % version.encode(), 1)
    with pytest.raises(NewerFormat, match=f"/z/superblock has format version {version}, this program knows up to 1"):
        decode_document("superblock", newer, Superblock, "/z/superblock")


def test_an_impossible_version_is_no_document() -> None:
    newer = FILES["superblock"].replace(b"superblock 1 ", b"superblock %s " % (b"9" * 5000), 1)
    with pytest.raises(FormatError, match="is no superblock"):
        decode_document("superblock", newer, Superblock, "/z/superblock")
