"""Certificates for tests, made once for a test process, and TLS contexts out of them for both sides."""

import atexit
import functools
import shutil
import ssl
import tempfile
from pathlib import Path
from typing import Any

from nbdserver.tls import Tls, TlsSettings, load_tls
from nbdserver.tls_make import make_certificates

CLIENTS = ("alice", "bob")


class Certificates:
    """What `sheepfold tls make` has written into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_certificates(directory, hosts=["localhost", "127.0.0.1", "::1"], clients=CLIENTS, days=2)

    def settings(self, mode: str = "forced", **more: Any) -> TlsSettings:
        return TlsSettings(mode=mode, certificates=self.directory, **more)

    def server(self, mode: str = "forced", **more: Any) -> Tls:
        tls = load_tls(self.settings(mode, **more))
        assert tls is not None
        return tls

    def client(self, name: str | None = "alice") -> ssl.SSLContext:
        """A client's side, which checks the server's name. name: whose certificate it shows; None: none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.directory / "ca-cert.pem")
        if name is not None:
            folder = self.directory / name
            context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
        return context


@functools.cache
def certificates(which: str = "") -> Certificates:
    """The ones of this process; another CA for each `which`."""
    directory = Path(tempfile.mkdtemp(prefix="sheepfold-certificates-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Certificates(directory)
