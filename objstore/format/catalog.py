"""Entries of the catalog's log and its snapshots: msgpack of tagged records. FORMAT.md, "Catalog"."""

from typing import TypeAlias

import msgspec
from crc32c import crc32c

from objstore.errors import FormatError
from objstore.units import BLOCK_BYTES


class Limit(msgspec.Struct, frozen=True, array_like=True):
    """So much a second, and the most that may be saved up for a burst; burst 0 = what is usual."""

    rate: int
    burst: int = 0


class VdiEntry(msgspec.Struct, frozen=True, tag="vdi", kw_only=True, omit_defaults=True):
    """A VDI is created (or its description replaced).

    base: the snapshot whose map its own began with, 0 = it began empty. hidden: it was deleted, its name is free, but
    its log stays for its snapshots, or it is in the trash. emptied: and its own data is discarded already. suspended:
    why nobody may open it; "" = anybody may. former_bytes: it was so large, and what lies between its size and there is
    not discarded yet; 0 = it is. limits: of what its clients may do, by objstore.volume.settings.LIMIT_KINDS.
    weight: of this VDI when several want more than there is.
    """

    vdi_id: int
    name: str
    log: int
    size_bytes: int
    copies: int
    mode: str
    created: float
    prealloc: bool
    base: int = 0
    hidden: bool = False
    emptied: bool = False
    suspended: str = ""
    former_bytes: int = 0
    limits: dict[str, Limit] = {}
    weight: int = 100


class TrashEntry(msgspec.Struct, frozen=True, tag="trash", kw_only=True):
    """A VDI that is hidden, or is hidden in the same record, came into the trash at the Unix time `deleted`, and is to
    leave it at `kept_until`; 0.0: it is not there any more. A VDI that is not hidden is not there."""

    vdi_id: int
    deleted: float
    kept_until: float


class DeleteEntry(msgspec.Struct, frozen=True, tag="delete", kw_only=True):
    """A VDI is deleted; its log is garbage from here on."""

    vdi_id: int


class TailRow(msgspec.Struct, frozen=True, array_like=True):
    """A sealed segment that the tail of a log begins with. zones: mask of those that hold it."""

    number: int
    seal_crc: int
    zones: int


class HeadEntry(msgspec.Struct, frozen=True, tag="head", kw_only=True, omit_defaults=True):
    """The head record of a log: see objstore.log.opening.Head."""

    log: int
    generation: int
    tail: list[TailRow]
    first_number: int
    checkpoint: int
    clean: bool
    epoch: str
    copies: int
    base_checkpoint: int = 0
    first_checkpoint: int = 0
    unbroken_since: int = 0


class PurgedEntry(msgspec.Struct, frozen=True, tag="purged", kw_only=True):
    """Nothing of a deleted VDI's log is left in any zone."""

    log: int


class SnapshotEntry(msgspec.Struct, frozen=True, tag="snapshot", kw_only=True, omit_defaults=True):
    """A snapshot exists (or its description is replaced): the map of `log` behind the operation at `position`, which is
    the map of checkpoint number `checkpoint` of that log.

    vdi_id: whose snapshot it is. index: 1 and up for each VDI, never given twice to one that exists. tag: "" = none.
    origin: identity of the snapshot that it was imported from (STREAM.md); "" = it was taken here.
    """

    snapshot_id: int
    log: int
    checkpoint: int
    position: int
    vdi_id: int
    tag: str
    index: int
    size_bytes: int
    created: float
    protected: bool = False
    hidden: bool = False
    origin: str = ""


class ImportEntry(msgspec.Struct, frozen=True, tag="import", kw_only=True):
    """A VDI is half of what it is to be: contents `identity` on top of contents `base`; identity "" = it is whole."""

    vdi_id: int
    base: str
    identity: str


class SnapshotDeleteEntry(msgspec.Struct, frozen=True, tag="snapshot-delete", kw_only=True):
    """A snapshot is deleted."""

    snapshot_id: int


class AttributeEntry(msgspec.Struct, frozen=True, tag="attribute", kw_only=True):
    """An attribute of a VDI has this value; None: it is gone."""

    vdi_id: int
    name: str
    value: bytes | None


class JobEntry(msgspec.Struct, frozen=True, tag="job", kw_only=True, omit_defaults=True):
    """How far a job on a range of a VDI was at one moment (`noted`). state: running, done, failed or aborted."""

    job_id: int
    kind: str
    vdi: str
    offset_bytes: int
    length_bytes: int
    state: str
    started: float
    noted: float
    bytes_done: int
    message: str = ""


class DamagedRun(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that no zone has whole, one behind the other, found under map entries that are so as well."""

    block: int
    blocks: int
    entry: int


class LostPage(msgspec.Struct, frozen=True, array_like=True):
    """A region whose map page no zone has: the place that the checkpoint's root gives for it."""

    region: int
    checkpoint: int
    offset: int
    length: int


class DamageEntry(msgspec.Struct, frozen=True, tag="damage", kw_only=True):
    """All that is known to be damaged of a log in every zone; nothing = nothing. complete: false if there is more."""

    log: int
    runs: list[DamagedRun]
    pages: list[LostPage]
    complete: bool


class StopEntry(msgspec.Struct, frozen=True, tag="stop", kw_only=True):
    """The store was closed cleanly."""

    wall: float


Entry: TypeAlias = (
    VdiEntry
    | TrashEntry
    | DeleteEntry
    | HeadEntry
    | PurgedEntry
    | DamageEntry
    | SnapshotEntry
    | SnapshotDeleteEntry
    | ImportEntry
    | AttributeEntry
    | JobEntry
    | StopEntry
)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole catalog at one position of its log. garbage: logs of deleted VDIs not yet purged."""

    next_log: int
    next_vdi: int
    vdis: list[VdiEntry]
    heads: list[HeadEntry]
    garbage: list[int]
    clean: bool
    snapshots: list[SnapshotEntry] = []
    next_snapshot: int = 1
    attributes: list[AttributeEntry] = []
    jobs: list[JobEntry] = []
    next_job: int = 1
    damage: list[DamageEntry] = []
    trash: list[TrashEntry] = []
    imports: list[ImportEntry] = []


_ENTRY = msgspec.msgpack.Decoder(Entry)


def _encoded(value: Entry | Snapshot) -> bytes:
    """As msgpack. By way of plain values: a record of more than 15 members would get the header of a long map, even
    where most of them are left out, and its bytes would change with the members that later versions know."""
    return msgspec.msgpack.encode(msgspec.to_builtins(value, builtin_types=(bytes,)))


def encode_entry(entry: Entry) -> tuple[bytes, int]:
    """(the entry padded to whole blocks, its length in bytes)."""
    data = _encoded(entry)
    return data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES, b"\0"), len(data)


def decode_entry(data: bytes | memoryview, length_bytes: int) -> Entry:
    """FormatError: not an entry that this program knows."""
    try:
        entry: Entry = _ENTRY.decode(bytes(data[:length_bytes]))
        return entry
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"catalog entry can't be read: {error}") from error


def encode_snapshot(snapshot: Snapshot, store_id: bytes, number: int) -> bytes:
    """16 bytes store, 4 number, 4 CRC32C over store, number and body, then the body."""
    body = _encoded(snapshot)
    identity = store_id + number.to_bytes(4, "little")
    return identity + crc32c(identity + body).to_bytes(4, "little") + body


def decode_snapshot(data: bytes, store_id: bytes, number: int) -> Snapshot:
    """FormatError: damaged, or another one."""
    identity, body = data[:20], data[24:]
    if identity != store_id + number.to_bytes(4, "little"):
        raise FormatError(f"not catalog snapshot {number} of this store")
    if crc32c(identity + body) != int.from_bytes(data[20:24], "little"):
        raise FormatError(f"catalog snapshot damaged number={number}")
    try:
        return msgspec.msgpack.decode(body, type=Snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"catalog snapshot can't be read number={number}: {error}") from error
