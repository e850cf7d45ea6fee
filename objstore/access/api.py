"""The control API's vocabulary: paths, bodies and errors that both of its sides share.

HTTP/1.1 with JSON bodies over a Unix socket of mode 0600; bodies are the records here and in objstore.volume.status.
`GET /v1/openapi.json` answers with the whole description, made from the types of the server's handlers. Any error is an
ErrorReply, its HTTP status from STATUS_OF_ERROR.
"""

from typing import Final

from msgspec import Struct

from objstore import errors
from objstore.volume.settings import MODES
from objstore.volume.status import LimitStatus, StoreStatus

BODY_BYTES_MAX: Final = 64 << 10
"""Longest request body; every valid one is far shorter."""


DATA_BYTES_MAX: Final = 1 << 20
"""Most bytes of a VDI in one request or answer."""


class LockNote(Struct, frozen=True, forbid_unknown_fields=False):
    """The line in a zone's lock that says who holds it. control: path of its control socket, empty = it has none."""

    pid: int
    control: str = ""


class CreateVdi(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VDI to create; copies: null = the store's default."""

    name: str
    size_bytes: int
    copies: int | None = None
    mode: str = MODES[0]
    prealloc: bool = False


class Copies(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many copies a VDI is to have."""

    copies: int


class TakeSnapshot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot to take; tag: "" = none. skip_unchanged: not if nothing was written since the last one."""

    tag: str = ""
    skip_unchanged: bool = False
    protected: bool = False


class TakeGroupSnapshot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot to take of several VDIs at one instant."""

    names: list[str]
    tag: str
    protected: bool = False


class Clone(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A clone to make of a snapshot (VDI@TAG, VDI@INDEX) or of a VDI as it is; copies, mode: null = as there."""

    source: str
    name: str
    copies: int | None = None
    mode: str | None = None


class NewName(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a VDI is to be called."""

    name: str


class NewSize(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How large a VDI is to be. reconnect: connections and handles are closed then, so that clients see it. force: it
    may become smaller; they are closed first, and nobody may open it until it is resumed."""

    size_bytes: int
    force: bool = False
    reconnect: bool = False


class Undelete(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VDI to bring back. name: what it is to be called, null = as before. vdi_id: null = the last deleted one."""

    name: str | None = None
    vdi_id: int | None = None


class Protection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a snapshot is protected from deletion."""

    protected: bool


class RecoveryRate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that recovery copies; 0 = no limit."""

    bytes_per_second_max: int


class SetLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits to set, by kind; rate 0 = none any more. What is not named stays, so does the weight if it is null."""

    limits: dict[str, LimitStatus] = {}
    weight: int | None = None


class ZoneChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """action: add, drain, remove, replace, set-weight. zone: path, number or beginning of the id of an existing one, or
    the path of the new one (add). path: of the new one (replace). weight: add, set-weight."""

    action: str
    zone: str
    path: str | None = None
    weight: float | None = None
    force: bool = False


class ServerStatus(Struct, frozen=True, kw_only=True):
    """The process that serves the store."""

    pid: int
    listen: list[str]
    clients: int
    """Connections, in any phase."""


class ClientStatus(Struct, frozen=True, kw_only=True):
    """One NBD connection at one moment. Bytes are those of the socket."""

    connection: int
    """Its number, counted from 1 since the server started."""
    client: str
    """Who is at its other end: `certificate:NAME`, else `uid:NUMBER`, else `address:IP`."""
    peer: str
    """As logs call the connection."""
    export: str | None
    """null: it has not chosen one yet."""
    state: str
    connected_seconds: float
    request_count: int
    error_count: int
    in_flight: int
    """Requests that wait for the store."""
    received_bytes: int
    sent_bytes: int


class FenceStatus(Struct, frozen=True, kw_only=True):
    """A client that may not use any export. seconds_left: null = until somebody lets it in."""

    client: str
    seconds_left: float | None


class Clients(Struct, frozen=True, kw_only=True):
    """Answer of `sheepfold client list`."""

    connections: list[ClientStatus]
    fenced: list[FenceStatus]


class KickClient(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections to end: `client` is a client, or the number of one connection. fence: refuse the client (of that
    connection) from now on, for `seconds` or, null, until it is let in."""

    client: str
    fence: bool = False
    seconds: float | None = None


class Kicked(Struct, frozen=True, kw_only=True):
    """What came of it. closed: connections. settled: nothing that they asked for can happen any more; false: something
    still waits for zones and may."""

    client: str
    closed: int
    settled: bool


class Reloaded(Struct, frozen=True, kw_only=True):
    """The configuration was read again. restart_needed: keys that have changed and count from the next start on."""

    restart_needed: list[str]


class Status(Struct, frozen=True, kw_only=True):
    """Answer of `sheepfold status`; server: null when the command opened the zones itself."""

    server: ServerStatus | None
    store: StoreStatus


class Session(Struct, frozen=True, kw_only=True):
    """First message of the WebSocket that a library client keeps open: its handles live as long as that."""

    session: str


class OpenHandle(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A handle to open, for the session of that name."""

    session: str
    read_only: bool = False


class Handle(Struct, frozen=True, kw_only=True):
    """An open handle. handle: its name in paths."""

    handle: str
    size_bytes: int
    read_only: bool
    description: str


class BeginImport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An import to begin, or to begin again: contents `identity` on top of contents `base` ("" = an empty disk; then
    the VDI is made). copies, mode: of a VDI that is made; 0, "" = as usual."""

    session: str
    base: str
    identity: str
    size_bytes: int
    copies: int = 0
    mode: str = ""


class FinishImport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The snapshot that ends an import; tag: "" = none."""

    tag: str = ""
    protected: bool = False


class Range(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A range of a VDI."""

    offset_bytes: int
    length_bytes: int


class ZeroRange(Range, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A range to be zeroed. no_hole: its whole blocks stay allocated."""

    no_hole: bool = False


class ExtentReply(Struct, frozen=True, kw_only=True):
    """See objstore.volume.base.Extent."""

    length_bytes: int
    hole: bool
    zero: bool


class ChangeReply(Struct, frozen=True, kw_only=True):
    """See objstore.volume.base.Change."""

    length_bytes: int
    changed: bool
    hole: bool
    zero: bool


class AttributeReply(Struct, frozen=True, kw_only=True):
    """An attribute of a VDI; its value is asked for by itself."""

    name: str
    length_bytes: int


class ErrorReply(Struct, frozen=True):
    """error: name of a class of objstore.errors, or of an HTTP condition; message: one line for people; bad: the
    damaged ranges (offset and length in bytes) of Corrupt."""

    error: str
    message: str
    bad: list[tuple[int, int]] = []


STATUS_OF_ERROR: Final[dict[type[errors.StoreError], int]] = {
    errors.InvalidRequest: 400,
    errors.OutOfRange: 400,
    errors.ReadOnly: 403,
    errors.NotFound: 404,
    errors.Exists: 409,
    errors.Busy: 423,
    errors.Suspended: 423,
    errors.NotSupported: 501,
    errors.Unavailable: 503,
    errors.Stopping: 503,
    errors.Fenced: 503,
    errors.NoSpace: 507,
}
"""Every other StoreError is 500."""


def error_name(error: errors.StoreError) -> str:
    """The nearest class that both sides know."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def http_status(error: errors.StoreError) -> int:
    """The HTTP status of the nearest class of the error that has one."""
    return next((STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR), 500)


def error_from_reply(reply: ErrorReply) -> errors.StoreError:
    """The exception that the server's side raised, or a plain StoreError where its name means nothing here."""
    kind = getattr(errors, reply.error, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.StoreError)):
        kind = errors.StoreError
    if issubclass(kind, errors.Corrupt):
        return kind(reply.message, reply.bad)
    return kind(reply.message)
