"""What a store says about itself and its VDIs: plain records for the control API, the command line and tests.

Field names are the keys of every `--json` output, so they change only with a line in README.md.
"""

from msgspec import Struct


class LimitStatus(Struct, frozen=True, kw_only=True):
    """So many operations or bytes a second, and the most that may be saved up for a burst; burst 0 = a tenth of a
    second's worth."""

    rate: int
    burst: int = 0


class VdiStatus(Struct, frozen=True, kw_only=True):
    """One VDI at one moment."""

    name: str
    vdi_id: int
    size_bytes: int
    copies: int
    mode: str
    created: float
    """Unix time in seconds."""
    attached: int
    """Open handles: connections in the transmission phase, and the control side's own."""
    state: str
    """`closed` (nobody has it open, its log is not loaded), `open`, or `failed` (see `reason`)."""
    reason: str
    """Why it failed; empty otherwise."""
    live_bytes: int
    """Bytes of the VDI that hold data (holes and reserved zeros don't count), one copy; of a clone, or of a VDI that
    was rolled back, those written since. 0 while it is closed."""
    dirty_bytes: int
    """Acknowledged and not yet durable."""
    last_flush: float | None
    """Unix time of the last flush that completed since the store was opened; null = none yet."""
    log: int
    """Number of its log, never used again by another VDI."""
    parent: str = ""
    """The snapshot that it is a clone of, or the VDI if it was cloned as it was; empty otherwise."""
    kept_bytes: int = 0
    """Bytes of files that stay because of its snapshots, one copy; what the VDI itself still has of them is among them.
    0 while it is closed."""
    damaged_bytes: int = 0
    """Bytes that no zone has whole, as far as reads and scrubs have found; `vdi damage` says which."""
    suspended: str = ""
    """Why nobody may open it until `vdi resume`; empty: anybody may."""
    importing: str = ""
    """BASE..IDENTITY of the import that has begun and not ended: nobody may open it; empty: it is whole."""
    limits: dict[str, LimitStatus] = {}
    """What its clients may do, by kind: iops, iops-read, iops-write, bytes, bytes-read, bytes-write."""
    weight: int = 100
    """Its part of what the server can do, relative to that of others."""


class TrashStatus(Struct, frozen=True, kw_only=True):
    """A deleted VDI that can still be brought back."""

    name: str
    vdi_id: int
    """Tells those of one name apart."""
    size_bytes: int
    copies: int
    created: float
    """Unix time in seconds."""
    deleted: float
    """Unix time in seconds."""
    kept_until: float
    """Unix time in seconds; then it is deleted for good."""
    file_bytes: int
    """Bytes of its files in the zones that are in service, all copies; what its snapshots or clones need among them
    stays when it goes."""


class SnapshotStatus(Struct, frozen=True, kw_only=True):
    """One snapshot."""

    name: str
    """What it is opened and exported as: VDI@TAG, or VDI@INDEX if it has no tag."""
    vdi: str
    vdi_deleted: bool
    """The VDI is gone, its snapshots are not."""
    tag: str
    index: int
    size_bytes: int
    created: float
    """Unix time in seconds."""
    protected: bool
    attached: int
    """Open handles."""
    clones: list[str]
    """VDIs that need it."""
    identity: str = ""
    """What its contents are called in every store: an import keeps it."""


class SnapshotSpace(Struct, frozen=True, kw_only=True):
    """What a snapshot alone needs at one moment."""

    name: str
    exclusive_bytes: int
    """Bytes of its data, one copy, that no other snapshot, VDI or clone shares. Their space comes back when it is
    deleted, as segments that nothing needs any more, or that collection empties."""


class SnapshotTaken(Struct, frozen=True, kw_only=True):
    """What came of taking a snapshot. taken: false if nothing was written since the newest one, which this is."""

    snapshot: SnapshotStatus
    taken: bool


class JobStatus(Struct, frozen=True, kw_only=True):
    """Work on a range of a VDI that may take long."""

    job_id: int
    kind: str
    """`allocate` or `flatten`."""
    vdi: str
    state: str
    """`running`, `done`, `failed` (see `message`), `aborted`, or `interrupted`: its process ended before it did."""
    message: str
    started: float
    """Unix time."""
    noted: float
    """Unix time of what is said here; of a running job: now."""
    seconds_left: float | None
    """Estimate; null = not known, or it does not run."""
    bytes_done: int
    bytes_total: int
    repeat_offset_bytes: int
    """Everything of the range in front of it is done; what is left can be asked for again from there."""


class DamagedRange(Struct, frozen=True, kw_only=True):
    """A part of a VDI that no zone has whole: reading it is an I/O error until it is written again."""

    offset_bytes: int
    length_bytes: int


class VdiDamage(Struct, frozen=True, kw_only=True):
    """What is known to be damaged of one VDI. complete: false if there is more than is remembered one by one."""

    name: str
    ranges: list[DamagedRange]
    complete: bool


class ScrubStatus(Struct, frozen=True, kw_only=True):
    """The pass under way, or the last one. Bytes and copies are those of all zones together."""

    running: bool
    on_demand: bool
    """Somebody asked for it: it goes as fast as the zones allow."""
    bytes_done: int
    bytes_total: int
    seconds_left: float | None
    """Estimate; null = not known yet, or none is running."""
    started: float | None
    finished: float | None
    """Unix time at which the last whole pass ended."""
    copies_checked: int
    copies_bad: int
    copies_repaired: int
    copies_unrepaired: int
    """Bad copies known now that could not be replaced."""
    read_repairs: int
    """Copies replaced since the store was opened because a read found them bad."""
    skipped: list[str]
    """VDIs that could not be opened for it, with the reason."""


class RecoveryStatus(Struct, frozen=True, kw_only=True):
    """Copies that are being made, or that are missing."""

    running: bool
    copies_missing: int
    """Copies that should be somewhere and are not, as far as the last look tells."""
    objects_unreachable: int
    """Segments and checkpoints of which no zone in service has a copy."""
    bytes_done: int
    bytes_total: int
    seconds_left: float | None
    """Estimate; null = not known yet, or nothing is under way."""
    bytes_per_second_max: int
    """0 = no limit."""
    copies_made: int
    """Since the store was opened."""
    problems: list[str]
    """What could not be done, and why; it is tried again."""


class ZoneStatus(Struct, frozen=True, kw_only=True):
    """One zone at one moment."""

    number: int
    id: str
    """Hexadecimal identity from the zone's superblock."""
    path: str
    state: str
    """`in` (takes part), `draining` (takes part, gets no new data), `failed` (is about to be put out) or `out`."""
    reason: str
    """Why it failed or is out; empty otherwise."""
    weight: float
    """Its share of new data, relative to the other zones'."""
    used_bytes: int
    free_bytes: int
    epoch: int
    """The newest membership that this zone knows of."""
    since_epoch: int = 0
    """Number of the first epoch of those known since which it takes part, or is out."""
    lag_seconds: float = 0.0
    """Age of the oldest data that this zone owes; 0 = none."""
    read_errors: int = 0
    """Reads that it has failed since it takes part."""
    last_error: str = ""
    """The last error that it was reported for, also after it has come back."""


class EpochInfo(Struct, frozen=True, kw_only=True):
    """One membership of zones."""

    number: int
    id: str
    time: float
    """Unix time."""
    members: list[int]
    """Numbers of the zones that take part, with their paths then in `paths`."""
    paths: list[str]
    out: list[int]
    w: int
    """How many of the members the next epoch had, or has, to reach."""
    complete: bool
    """Every member was known to hold the record when this copy was written."""
    reason: str
    """What it was made for: a start, a zone that is out, back, added, removed, draining."""


class ZoneObjects(Struct, frozen=True, kw_only=True):
    """What lies in one zone. reason: why that is not known; empty otherwise."""

    number: int
    path: str
    segments: int = 0
    segment_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    reason: str = ""


class StoreInfo(Struct, frozen=True, kw_only=True):
    """What a store is. Segments, checkpoints and bytes are those of all copies together."""

    store_id: str
    created: float
    """Unix time."""
    format_version: int
    features_read: list[str]
    """What a program must know to read the store, to write it, to check it."""
    features_write: list[str]
    features_check: list[str]
    epoch: int
    next_zone: int
    """Zone numbers used so far, of 64."""
    epochs: list[EpochInfo]
    """Those that are still known, oldest first."""
    zones: list[ZoneObjects]
    segments: int
    segment_bytes: int
    checkpoints: int
    checkpoint_bytes: int


class StoreStatus(Struct, frozen=True, kw_only=True):
    """A store at one moment."""

    store_id: str
    format_version: int
    health: str
    """`ok`, `degraded` (serves everything, something is missing) or `stopped` (some VDI can't be written)."""
    reasons: list[str]
    """One line each, empty when the health is "ok"."""
    zones: list[ZoneStatus]
    epoch: int
    vdis: int
    """How many VDIs there are."""
    dirty_bytes: int
    dirty_bytes_max: int
    map_bytes: int
    """Regions of block maps in memory, as far as `map_memory_bytes` limits them."""
    map_bytes_max: int
    map_waiting: int
    """Requests that wait for a checkpoint because changed regions alone take all of that memory."""
    unclean_stop: str | None
    """What the last stop may have cost, if it was not clean; null after a clean stop."""
    started: float
    """Unix time at which the store was opened."""
    version: str
    """Version of the program that has the store open."""
    scrub: ScrubStatus
    recovery: RecoveryStatus
    under_replicated: int = 0
    """Segments of open VDIs with fewer copies in service than they should have."""
    rebuilt_pages: int = 0
    """Map pages that no zone had whole and that the log gave again, since the store was opened."""
    bad_copies: int = 0
    """Blocks and directories that a zone returned with a wrong checksum, since the store was opened."""
    moved_bytes: int = 0
    """What collection has written again, one copy, since the store was opened."""
    freed_segments: int = 0
    """Since the store was opened."""
    loaded_map_pages: int = 0
    """Pages of block maps that had to be read from zones, since the store was opened."""
    crowded_vdis: int = 0
    """Open VDIs whose writes wait until collection has freed space."""
    last_flushes: dict[str, float | None] = {}
    """Unix time of the last flush of each open VDI; null = none since the store was opened."""
