"""What a store says about itself and its VDIs: plain records for the control API, the command line and tests.

Field names are the keys of every `--json` output, so they change only with a line in README.md.
"""

from msgspec import Struct


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
    """Bytes of the VDI that hold data (holes and reserved zeros don't count), one copy."""
    dirty_bytes: int
    """Acknowledged and not yet durable."""
    last_flush: float | None
    """Unix time of the last flush that completed since the store was opened; null = none yet."""
    log: int
    """Number of its log, never used again by another VDI."""


class ZoneStatus(Struct, frozen=True, kw_only=True):
    """One zone at one moment."""

    id: str
    """Hexadecimal identity from the zone's superblock."""
    path: str
    state: str
    """`in` (takes part) or `failed` (see `reason`)."""
    reason: str
    used_bytes: int
    free_bytes: int
    epoch: int
    """The newest membership that this zone knows of."""


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
    unclean_stop: str | None
    """What the last stop may have cost, if it was not clean; null after a clean stop."""
    started: float
    """Unix time at which the store was opened."""
    version: str
    """Version of the program that has the store open."""
