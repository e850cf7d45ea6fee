"""Certificates: the server's as an SSL context, and the names in those of clients.

The files of a directory have the names that GnuTLS programs (libnbd, nbdkit, QEMU, libvirt) give them: ca-cert.pem,
server-cert.pem (the chain that leads to the CA behind it), server-key.pem, and ca-crl.pem if certificates were revoked.
Spec: proto.md, "TLS support", "TLS versions".
"""

import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from nbdserver.handshake import TlsMode
from objstore.errors import InvalidRequest

CA: Final = "ca-cert.pem"
CERTIFICATE: Final = "server-cert.pem"
KEY: Final = "server-key.pem"
REVOKED: Final = "ca-crl.pem"
MODES: Final = tuple(mode.value for mode in TlsMode)

_SHORT: Final = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
"""RFC 4514, section 3; other attributes keep their long names."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """[tls]: how the server offers TLS. certificates: directory. verify_clients: only those that show a certificate of
    the CA. psk: a file of pre-shared keys, refused (InvalidRequest): Python's ssl module has them from 3.13 on."""

    mode: str = TlsMode.OFF.value
    certificates: Path | None = None
    verify_clients: bool = True
    psk: Path | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidRequest(f"mode = {self.mode!r} is not possible; {', '.join(MODES)} are")
        if self.psk is not None:
            raise InvalidRequest(f"psk = {self.psk}: {psk_refusal()}")
        if self.mode != TlsMode.OFF.value and self.certificates is None:
            raise InvalidRequest(f"mode = {self.mode} needs certificates = DIRECTORY; `sheepfold tls make` makes some")


def psk_refusal() -> str:
    """Why pre-shared keys can't be used."""
    if hasattr(ssl.SSLContext, "set_psk_server_callback"):
        return "this version of Sheepfold has certificates only, no pre-shared keys (PSK)"
    return f"pre-shared keys (PSK) need Python 3.13, this is {sys.version.split()[0]}; use certificates"


class Tls(NamedTuple):
    """What a connection needs to know of TLS from its beginning to its end; a reload makes another one."""

    mode: TlsMode
    context: ssl.SSLContext


def load_tls(settings: TlsSettings) -> Tls | None:
    """Read the files; None: TLS is off. InvalidRequest: they can't be used."""
    if settings.mode == TlsMode.OFF.value:
        return None
    return Tls(TlsMode(settings.mode), make_context(settings))


def make_context(settings: TlsSettings) -> ssl.SSLContext:
    """The context for the server's side of connections: TLS 1.2 and later, no renegotiation, no resumption (which would
    go by the verification of an earlier connection). InvalidRequest, one line."""
    assert settings.certificates is not None
    directory = settings.certificates
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    certificate, key = directory / CERTIFICATE, directory / KEY
    _check_readable(certificate)
    _check_readable(key)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise InvalidRequest(f"{certificate} and {key} can't be used together: {_reason(error)}") from error
    if settings.verify_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authority(context, directory / CA)
        if (directory / REVOKED).exists():
            _load_authority(context, directory / REVOKED)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise InvalidRequest(f"{path} can't be used: {_reason(error)}") from error


def _check_readable(path: Path) -> None:
    """The ssl module names no file when it can't read one."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidRequest(
            f"{path}: {error.strerror}; `sheepfold tls make` shows which files there must be"
        ) from error


def _no_password() -> NoReturn:
    raise InvalidRequest(f"{KEY} is encrypted, but nobody is there to type its password")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def distinguished_name(certificate: Mapping[str, Any]) -> str:
    """The subject of a certificate (what ssl.SSLSocket.getpeercert gives) as RFC 4514 writes it, last part first."""
    parts = []
    for relative in reversed(certificate.get("subject", ())):
        parts.append("+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in relative))
    return ",".join(parts)


def certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    """Every name that a certificate is for: common names, alternative names, the whole distinguished name."""
    names = {value for relative in certificate.get("subject", ()) for kind, value in relative if kind == "commonName"}
    names |= {value for _, value in certificate.get("subjectAltName", ()) if isinstance(value, str)}
    names.add(distinguished_name(certificate))
    return frozenset(names - {""})


def _escaped(value: str) -> str:
    """RFC 4514, section 2.4."""
    escaped = "".join(f"\\{c}" if c in ',+"\\<>;' else c for c in value).replace("\0", "\\00")
    if escaped.startswith(("#", " ")):
        escaped = f"\\{escaped}"
    return f"{escaped[:-1]}\\ " if len(value) > 1 and value.endswith(" ") else escaped
