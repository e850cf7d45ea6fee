"""The configuration file: TOML to frozen dataclasses, checked once at start.

Strict: an unknown key is an error that names the nearest valid one. Keys that hold sizes (`size` and every `*_bytes`,
`*_bytes_max`) take a number of bytes or a text with K, M, G, T. Relative paths start at the file's own directory.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from nbdserver.access import ALL_OTHERS, Access, ExportRules, Who
from nbdserver.server import ServerSettings
from nbdserver.tls import TlsSettings
from objstore.errors import InvalidRequest
from objstore.names import check_name, check_path
from objstore.units import GIB, MIB, check_vdi_bytes, parse_size
from objstore.volume.settings import MODES, StoreSettings, check_mode

CONFIG_BYTES_MAX: Final = 1 << 20

T = TypeVar("T")


class ConfigError(InvalidRequest):
    """The configuration file can't be used; the message names file and key."""


@dataclass(frozen=True, slots=True)
class VdiConfig:
    """A VDI that `serve` creates if it is missing: [vdi.NAME]."""

    size: int
    copies: int | None = None
    mode: str = MODES[0]
    prealloc: bool = False

    def __post_init__(self) -> None:
        check_vdi_bytes(self.size)
        check_mode(self.mode)
        if self.copies is not None and self.copies < 1:
            raise InvalidRequest(f"copies = {self.copies} is not possible; at least 1 is")


@dataclass(frozen=True, slots=True)
class _TopLevel:
    """The keys outside of any table."""

    zones: list[str] = field(default_factory=list)
    listen: list[str] = field(default_factory=list)
    default: str | None = None
    control: str | None = None
    metrics: str | None = None
    log_format: Literal["auto", "text", "json", "journal"] = "auto"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a configuration file can say. Without a file: the defaults, no zones."""

    zones: tuple[Path, ...] = ()
    listen: tuple[str, ...] = ()
    default: str | None = None
    control: Path | None = None
    metrics: str | None = None
    log_format: str = "auto"
    vdi: Mapping[str, VdiConfig] = field(default_factory=dict)
    store: StoreSettings = field(default_factory=StoreSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    access: Access = field(default_factory=Access)


_TABLES: Final = ("store", "server", "vdi", "tls", "access")
WHO_KEYS: Final = frozenset(("see", "read", "write"))
"""Keys of [access.NAME] that list clients."""

SERVER_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "list_snapshots": (False, True),
    "extended_headers": (False, True),
    "connections_max": (1, 65_536),
    "client_connections_max": (0, 65_536),
    "client_connects_per_second": (0.0, 100_000.0),
    "handshake_seconds": (0.1, 600.0),
    "requests_in_flight_max": (1, 4096),
    "buffer_bytes_max": (128 * MIB, 64 * GIB),
    "stall_seconds": (1.0, 600.0),
    "slow_request_seconds": (0.0, 600.0),
    "stop_seconds": (0.0, 600.0),
    "busy_poll_seconds": (0.0, 0.01),
}
"""Keys of [server]: the fields of ServerSettings that an administrator may have a reason to change."""


def load(path: Path) -> Config:
    """Read and check a configuration file. ConfigError, one line."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from error
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"configuration file {path}: larger than {CONFIG_BYTES_MAX} bytes")
    try:
        return parse(tomllib.loads(data.decode()), path.absolute().parent)
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration file {path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"configuration file {path}: nested too deeply") from error
    except (tomllib.TOMLDecodeError, InvalidRequest) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error


def parse(document: Mapping[str, Any], directory: Path) -> Config:
    """Check a decoded document; relative paths start at `directory`. InvalidRequest names the key."""
    top_keys = {key: value for key, value in document.items() if key not in _TABLES}
    top = _convert(top_keys, _TopLevel, "", _keys(_TopLevel), _TABLES)
    for index, zone in enumerate(top.zones):
        check_path(zone, f"zones[{index}]")
    if top.control is not None:
        check_path(top.control, "control")
    vdis = {}
    for name, table in _table(document, "vdi").items():
        check_name(name)
        vdis[name] = _convert(table, VdiConfig, f"vdi.{name}", _keys(VdiConfig))
    return Config(
        zones=tuple(directory / zone for zone in top.zones),
        listen=tuple(top.listen),
        default=top.default,
        control=directory / top.control if top.control is not None else None,
        metrics=top.metrics,
        log_format=top.log_format,
        vdi=vdis,
        store=_convert(_table(document, "store"), StoreSettings, "store", _keys(StoreSettings)),
        server=_server_settings(_table(document, "server")),
        tls=_tls_settings(_table(document, "tls"), directory),
        access=_access(_table(document, "access")),
    )


def _access(table: Mapping[str, Any]) -> Access:
    rules = {}
    for name, one in table.items():
        where = f"access.{name}"
        if name != ALL_OTHERS:
            base, at, tag = name.partition("@")
            check_name(base, "name in [access]")
            if at:
                check_name(tag, "tag in [access]")
        clients: dict[str, Any] = {}
        rest = dict(one) if isinstance(one, dict) else one
        if isinstance(rest, dict):
            for key in WHO_KEYS & rest.keys():
                listed = rest.pop(key)
                if not isinstance(listed, list):
                    raise InvalidRequest(f"{where}.{key} must be a list of tables, e.g. [{{ certificate = 'web' }}]")
                clients[key] = [
                    _convert(who, Who, f"{where}.{key}[{index}]", _keys(Who)) for index, who in enumerate(listed)
                ]
        rules[name] = dataclasses.replace(_convert(rest, ExportRules, where, _keys(ExportRules)), **clients)
    return Access(rules)


def _tls_settings(table: Mapping[str, Any], directory: Path) -> TlsSettings:
    values = dict(table)
    for key in ("certificates", "psk"):
        if isinstance(values.get(key), str):
            check_path(values[key], f"tls.{key}")
            values[key] = directory / values[key]
    return _convert(values, TlsSettings, "tls", _keys(TlsSettings))


def _server_settings(table: Mapping[str, Any]) -> ServerSettings:
    settings = _convert(table, ServerSettings, "server", list(SERVER_BOUNDS))
    for key, (lowest, highest) in SERVER_BOUNDS.items():
        value = getattr(settings, key)
        if not lowest <= value <= highest:
            raise InvalidRequest(f"server: {key} = {value} is out of range: {lowest} to {highest} is possible")
    return settings


def _keys(of: type) -> list[str]:
    return [item.name for item in dataclasses.fields(of)]


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise InvalidRequest(f"{key} must be a table: [{key}]")
    return table


def _convert(table: object, into: type[T], where: str, keys: Sequence[str], tables: Sequence[str] = ()) -> T:
    """A table as an instance of the dataclass `into`; tables: further keys to propose for a mistyped one."""
    if not isinstance(table, dict):
        raise InvalidRequest(f"{where} must be a table: [{where}]")
    prefix = f"{where}." if where else ""
    values = {}
    for key, value in table.items():
        if key not in keys:
            nearest = difflib.get_close_matches(key, [*keys, *tables], n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown key {prefix}{key}; the nearest valid one is {prefix}{nearest}")
        values[key] = _size(value, prefix + key) if key.endswith(("size", "_bytes", "_bytes_max")) else value
    try:
        return msgspec.convert(values, into)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        key = place.rstrip("`").removeprefix(".")
        raise InvalidRequest(f"{prefix}{key}: {reason}" if key else f"{where}: {reason}") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from error


def _size(value: object, key: str) -> object:
    """A text with K, M, G, T as bytes; anything else unchanged, for the type check to judge."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{key}: {error}") from error
