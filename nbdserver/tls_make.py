"""Throw-away certificates: a CA, a server's, and a directory with a certificate for each client.

For trying TLS out and for small installations; the CA's key lies beside them. Keys are on the curve P-256.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdserver.tls import CA, CERTIFICATE, KEY
from objstore.errors import Exists, InvalidRequest
from objstore.names import check_name

CA_KEY: Final = "ca-key.pem"
CLIENT_CERTIFICATE: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"
CLOCK_SKEW: Final = timedelta(hours=1)
"""Valid so long before now: clocks of clients may be behind."""
COMMON_NAME_MAX: Final = 64
"""RFC 5280, upper bound of a common name."""
DAYS_MAX: Final = 36_500


def make_certificates(directory: Path, *, hosts: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Write everything; returns the paths, the server's directory first. hosts: names and addresses that clients reach
    the server by. clients: one certificate each, with that common name.

    In a directory that has a CA of an earlier run, clients are added and the rest stays. Exists: a client's directory
    is there already. InvalidRequest: a name can't be used. OSError.
    """
    for name in clients:
        _check_client(name)
    for host in hosts:
        _host(host)
    if not 1 <= days <= DAYS_MAX:
        raise InvalidRequest(f"certificates are made for 1 to {DAYS_MAX} days, not {days}")
    for name in clients:
        if os.path.lexists(directory / name):
            raise Exists(f"{directory / name} exists already; a client's certificate is not replaced")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(directory / CA_KEY):
        authority = _Authority.load(directory, days)
    else:
        authority = _Authority.make(days)
        _write(directory / CA, authority.certificate)
        _write(directory / CA_KEY, _pem(authority.key), private=True)
        certificate, key = authority.issue(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, hosts)
        _write(directory / CERTIFICATE, certificate)
        _write(directory / KEY, key, private=True)
    made = [directory]
    for name in clients:
        certificate, key = authority.issue(name, ExtendedKeyUsageOID.CLIENT_AUTH)
        folder = directory / name
        folder.mkdir(mode=0o700)
        _write(folder / CA, authority.certificate)
        _write(folder / CLIENT_CERTIFICATE, certificate)
        _write(folder / CLIENT_KEY, key, private=True)
        made.append(folder)
    return made


def _check_client(name: str) -> None:
    check_name(name, "client name")
    if len(name) > COMMON_NAME_MAX:
        raise InvalidRequest(f"client name {name!r} has {len(name)} characters; a certificate takes {COMMON_NAME_MAX}")
    if name in (CA, CA_KEY, CERTIFICATE, KEY):
        raise InvalidRequest(f"client name {name!r} is the name of a file that is needed")


class _Authority:
    """Issues certificates. certificate: its own, as PEM."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, subject: x509.Name, certificate: bytes, days: int) -> None:
        self.key = key
        self.certificate = certificate
        self._subject = subject
        self._days = days

    @classmethod
    def make(cls, days: int) -> "_Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sheepfold throw-away CA")])
        builder = (
            _begin(subject, subject, key, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return cls(key, subject, certificate, days)

    @classmethod
    def load(cls, directory: Path, days: int) -> "_Authority":
        """That of an earlier run. InvalidRequest: its files are not."""
        text = (directory / CA).read_bytes()
        try:
            key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(text)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{directory / CA} and {directory / CA_KEY} are no CA of an earlier run") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise InvalidRequest(f"{directory / CA_KEY} is not the key of {directory / CA}")
        return cls(key, certificate.subject, text, days)

    def issue(self, name: str, usage: x509.ObjectIdentifier, hosts: Sequence[str] = ()) -> tuple[bytes, bytes]:
        """Certificate and key of a new pair, as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            _begin(subject, self._subject, key, self._days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_host, hosts))), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _pem(key)


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    """InvalidRequest: it is neither an address nor a name."""
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError as error:
        raise InvalidRequest(
            f"host {text!r} can't stand in a certificate: international names in their form xn--"
        ) from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    """A new file; FileExistsError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o644)
    with open(handle, "wb") as file:
        file.write(data)
