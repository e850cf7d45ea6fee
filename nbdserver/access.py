"""Who may see, read and write an export: rules of the configuration, and who is on an export now.

A rule belongs to a name: that of a VDI, of one of its snapshots (NAME@TAG; without a rule of its own it has the VDI's)
or `*`, for all that have none. An export without any rule is open to whoever reaches the server.
To a client that may not see an export there is none of that name, whatever it asks; who may see but not use it is told
why not.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, NamedTuple, Protocol

from nbdserver.identity import Peer
from objstore.errors import InvalidRequest

ALL_OTHERS: Final = "*"


@functools.cache
def _network(text: str) -> IPv4Network | IPv6Network:
    """One address, or a range in CIDR notation. ValueError."""
    return ip_network(text)


@dataclass(frozen=True, slots=True)
class Who:
    """Clients: those for which everything holds that is given. certificate: a common name, an alternative name or the
    whole distinguished name (RFC 4514). address: one or a range (CIDR). uid: user at the other end of a Unix socket.
    anyone: really."""

    certificate: str | None = None
    address: str | None = None
    uid: int | None = None
    anyone: bool = False

    def __post_init__(self) -> None:
        conditions = [self.certificate, self.address, self.uid]
        if self.anyone == any(condition is not None for condition in conditions):
            raise InvalidRequest("give one or more of certificate, address and uid, or anyone = true alone")
        if self.certificate == "":
            raise InvalidRequest("certificate must not be empty")
        if self.uid is not None and self.uid < 0:
            raise InvalidRequest(f"uid = {self.uid} is not possible")
        if self.address is not None:
            try:
                _network(self.address)
            except ValueError as error:
                raise InvalidRequest(f"address = {self.address!r}: {error}") from error

    def fits(self, peer: Peer) -> bool:
        """Whether this client is meant."""
        if self.certificate is not None and self.certificate not in peer.names:
            return False
        if self.uid is not None and self.uid != peer.uid:
            return False
        return self.address is None or _is_in(peer.address, self.address)


def _is_in(address: str, network: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False  # a Unix socket's, or a guest's (vsock)
    if found.version == 6 and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found in _network(network)


class Right(Enum):
    """What a client may do with an export, less first."""

    NOTHING = "it is as if there were no such export"
    SEE = "it is told why it can't use it"
    READ = "it gets it read-only"
    WRITE = "it gets it as it is"


@dataclass(frozen=True, slots=True)
class ExportRules:
    """[access.NAME]. Without `see`, `read` and `write` everyone may write; with any of them only who is in it may
    do that (and less). connections_max: 0 = no limit. one_writer: one client at a time may be attached for writing."""

    see: Sequence[Who] = ()
    read: Sequence[Who] = ()
    write: Sequence[Who] = ()
    tls: bool = False
    connections_max: int = 0
    one_writer: bool = False

    def __post_init__(self) -> None:
        if self.connections_max < 0:
            raise InvalidRequest(f"connections_max = {self.connections_max} is not possible; 0 is no limit")

    def right(self, peer: Peer, *, secure: bool) -> Right:
        """secure: the connection has TLS."""
        if self.tls and not secure:
            return Right.NOTHING
        if not (self.see or self.read or self.write):
            return Right.WRITE
        for clients, right in ((self.write, Right.WRITE), (self.read, Right.READ), (self.see, Right.SEE)):
            if any(who.fits(peer) for who in clients):
                return right
        return Right.NOTHING

    @property
    def names_certificates(self) -> bool:
        return any(who.certificate is not None for who in (*self.see, *self.read, *self.write))


OPEN: Final = ExportRules()


@dataclass(frozen=True, slots=True)
class Access:
    """All rules, by the name that they are for."""

    rules: Mapping[str, ExportRules] = field(default_factory=dict)

    def of(self, name: str) -> ExportRules:
        """The rules of an export, by its real name."""
        rules = self.rules
        if not rules:
            return OPEN
        for known in (name, name.partition("@")[0], ALL_OTHERS):
            if known in rules:
                return rules[known]
        return OPEN

    def check(self, *, tls: bool, certificates: bool) -> None:
        """InvalidRequest, one line, for rules that nobody could meet. tls: there is any; certificates: clients show
        theirs."""
        for name, rules in self.rules.items():
            if rules.tls and not tls:
                raise InvalidRequest(f"access.{name}: tls = true, but TLS is off (mode in [tls])")
            if rules.names_certificates and not certificates:
                raise InvalidRequest(
                    f"access.{name} names a certificate, but clients show none (mode, verify_clients in [tls])"
                )


class Attached(Protocol):
    """A connection, as far as others that want the same export care."""

    @property
    def client(self) -> str:
        """See Peer.client."""
        ...

    def present(self) -> bool:
        """False: it is about to end, and who comes now waits for that."""
        ...


class _Place(NamedTuple):
    client: str
    writes: bool


class Attachments:
    """Who is attached to which volume now. In the event loop only."""

    def __init__(self) -> None:
        self._on: dict[Any, dict[Attached, _Place]] = {}

    def attach(self, who: Attached, volume: object, rules: ExportRules, *, writes: bool) -> str | None:
        """Let a connection in, to be paired with `detach`; or why it can't come now."""
        here = self._on.setdefault(volume, {})
        others = [place for other, place in here.items() if other.present()]
        if rules.connections_max and len(others) >= rules.connections_max:
            return f"the export has its connections_max = {rules.connections_max} connections"
        if rules.one_writer and writes:
            for other in others:
                if other.writes and other.client != who.client:
                    return f"the export has one writer at a time, now {other.client}"
        here[who] = _Place(who.client, writes)
        return None

    def detach(self, who: Attached, volume: object) -> None:
        """It is gone, or was not let in. Idempotent."""
        here = self._on.get(volume, {})
        here.pop(who, None)
        if not here:
            self._on.pop(volume, None)
