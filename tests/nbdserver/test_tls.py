"""Certificates: files that can't be used are named in one line, names are read as RFC 4514 writes them."""

import shutil
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nbdserver.cli import main
from nbdserver.tls import TlsSettings, certificate_names, distinguished_name, load_tls
from nbdserver.tls_make import make_certificates
from objstore.errors import Exists, InvalidRequest
from tests.spec.test_tls import refused
from tests.support.certificates import certificates
from tests.support.our_server import serve
from tests.support.serving import Disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of good certificates, to be spoiled."""
    return Path(shutil.copytree(certificates().directory, tmp_path / "tls"))


def test_off_needs_nothing() -> None:
    assert load_tls(TlsSettings()) is None


@pytest.mark.parametrize("mode", ["selective", "forced"])
def test_modes_need_certificates(mode: str) -> None:
    with pytest.raises(InvalidRequest, match=r"certificates = DIRECTORY"):
        TlsSettings(mode=mode)


def test_unknown_mode() -> None:
    with pytest.raises(InvalidRequest, match="'on' is not possible; off, selective, forced are"):
        TlsSettings(mode="on")


def test_pre_shared_keys_are_refused_with_the_reason(tmp_path: Path) -> None:
    reason = "need Python 3.13" if sys.version_info < (3, 13) else "certificates only"
    with pytest.raises(InvalidRequest, match=reason):
        TlsSettings(psk=tmp_path / "keys")


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM\n"])
def test_files_that_can_not_be_used_are_named(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=name) as raised:
        load_tls(TlsSettings("forced", folder))
    assert "\n" not in str(raised.value)


def test_a_key_of_another_certificate(folder: Path) -> None:
    shutil.copy(certificates("other").directory / "server-key.pem", folder)
    with pytest.raises(InvalidRequest, match="key values mismatch"):
        load_tls(TlsSettings("forced", folder))


def test_an_encrypted_key_asks_nobody(folder: Path) -> None:
    key = serialization.load_pem_private_key((folder / "server-key.pem").read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (folder / "server-key.pem").write_bytes(encrypted)
    with pytest.raises(InvalidRequest, match=r"server-key\.pem is encrypted"):
        load_tls(TlsSettings("forced", folder))


async def test_revoked_certificates_are_refused(folder: Path, tmp_path: Path) -> None:
    """ca-crl.pem, if it is there."""
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    alice = x509.load_pem_x509_certificate((folder / "alice" / "client-cert.pem").read_bytes())
    now = datetime.now(UTC)
    revoked = x509.RevokedCertificateBuilder().serial_number(alice.serial_number).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject).last_update(now)
    builder = builder.next_update(now + timedelta(days=1)).add_revoked_certificate(revoked)
    (folder / "ca-crl.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    async with serve([Disk()], tmp_path, tls=load_tls(TlsSettings("forced", folder))) as served:
        assert await refused(served.address, certificates().client("alice"))
        assert not await refused(served.address, certificates().client("bob"))


def shown(*subject: tuple[str, str], alternative: tuple[tuple[str, str], ...] = ()) -> dict[str, object]:
    """A certificate as the ssl module shows it."""
    return {"subject": tuple(((kind, value),) for kind, value in subject), "subjectAltName": alternative}


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ((("countryName", "DE"), ("organizationName", "Ex, Inc."), ("commonName", "a")), "CN=a,O=Ex\\, Inc.,C=DE"),
        ((("commonName", " #x "),), "CN=\\ #x\\ "),
        ((("commonName", "#1"),), "CN=\\#1"),
        ((("commonName", 'a+b"c\\d<e>f;g'),), 'CN=a\\+b\\"c\\\\d\\<e\\>f\\;g'),
        ((("commonName", "a\0b"),), "CN=a\\00b"),
        ((("emailAddress", "a@b"),), "emailAddress=a@b"),
        ((), ""),
    ],
)
def test_distinguished_names(subject: tuple[tuple[str, str], ...], text: str) -> None:
    assert distinguished_name(shown(*subject)) == text


def test_a_name_can_not_be_two_parts_of_another() -> None:
    """CN=a,O=b as one common name is not the name of CN=a of O=b."""
    assert distinguished_name(shown(("commonName", "a,O=b"))) != distinguished_name(
        shown(("organizationName", "b"), ("commonName", "a"))
    )


def test_names_of_a_certificate() -> None:
    alternative = (("DNS", "host.example"), ("IP Address", "10.0.0.1"), ("email", "a@b"))
    names = certificate_names(shown(("organizationName", "O"), ("commonName", "a"), alternative=alternative))
    assert names == {"a", "host.example", "10.0.0.1", "a@b", "CN=a,O=O"}
    assert certificate_names({}) == frozenset()


def test_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written works, keys are nobody else's business, and a second run adds clients to the same CA."""
    directory = tmp_path / "tls"
    assert main(["tls", "make", str(directory), "--host", "storage.example", "--host", "10.0.0.1"]) == 0
    said = capsys.readouterr().out
    assert str(directory / "client") in said
    for key in ("ca-key.pem", "server-key.pem", "client/client-key.pem"):
        assert (directory / key).stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o077 == 0
    assert load_tls(TlsSettings("forced", directory)) is not None
    server = x509.load_pem_x509_certificate((directory / "server-cert.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["storage.example", "localhost"]
    assert server.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "storage.example"
    before = (directory / "ca-cert.pem").read_bytes()
    assert main(["tls", "make", str(directory), "--client", "web 1", "--client", "web 2", "--json"]) == 0
    assert (directory / "ca-cert.pem").read_bytes() == before
    for name in ("client", "web 1", "web 2"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(directory / name / "ca-cert.pem")
        context.load_cert_chain(directory / name / "client-cert.pem", directory / name / "client-key.pem")
        certificate = x509.load_pem_x509_certificate((directory / name / "client-cert.pem").read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(before))


def test_make_replaces_nothing(tmp_path: Path) -> None:
    make_certificates(tmp_path, hosts=["localhost"], clients=["a"], days=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    with pytest.raises(Exists, match="a exists already"):
        make_certificates(tmp_path, hosts=["localhost"], clients=["b", "a"], days=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before
    (tmp_path / "ca-key.pem").write_text("nonsense")
    with pytest.raises(InvalidRequest, match="no CA of an earlier run"):
        make_certificates(tmp_path, hosts=["localhost"], clients=["b"], days=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--client", "a/b"], "client name 'a/b'"),
        (["--client", "ca-key.pem"], "a file that is needed"),
        (["--client", "x" * 65], "65 characters"),
        (["--days", "0"], "1 to 36500 days"),
        (["--host", "bücher.example"], "bücher"),
    ],
)
def test_make_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(["tls", "make", str(tmp_path / "tls"), *arguments]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not (tmp_path / "tls" / "ca-key.pem").exists()
