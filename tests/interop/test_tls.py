"""Real clients over TLS, in mode forced, with client certificates: libnbd's tools (GnuTLS) and QEMU's."""

import json
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.certificates import certificates
from tests.support.clients import run
from tests.support.our_server import serve
from tests.support.serving import MIB, Disk, Served, serve_peer

IMAGE_BYTES = 16 * MIB
ALICE = certificates().directory / "alice"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(
        [Disk(size_bytes=IMAGE_BYTES)], tmp_path, listen=["unix", "tcp"], tls=certificates().server()
    ) as server:
        yield server


def uri(served: Served, transport: str, folder: Path | None = ALICE) -> str:
    """An NBD URI with the certificates of a client."""
    unix, tcp = served.addresses
    query = "" if folder is None else f"tls-certificates={folder}"
    if transport == "unix":
        return f"nbds+unix:///disk?socket={unix.removeprefix('unix://')}&{query}"
    port = tcp.rpartition(":")[2]
    return f"nbds://localhost:{port}/disk?{query}"


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_nbdinfo(served: Served, transport: str) -> None:
    said = json.loads((await run("nbdinfo", "--json", uri(served, transport))).out)
    assert said["TLS"] is True
    assert said["structured"] is True
    (disk,) = said["exports"]
    assert disk["export-size"] == IMAGE_BYTES
    assert disk["contexts"][0] == "base:allocation"


async def test_nbdinfo_is_refused_without_tls_and_without_certificate(served: Served) -> None:
    plain = uri(served, "tcp", None).replace("nbds:", "nbd:")
    refused = await run("nbdinfo", plain, check=False)
    assert refused.code != 0
    assert "without TLS" in refused.out
    strange = certificates("other").directory / "alice"
    assert (await run("nbdinfo", uri(served, "tcp", strange), check=False)).code != 0


async def test_nbdcopy_there_and_back(served: Served, tmp_path: Path) -> None:
    """Four connections, requests of up to 256 KiB in both directions."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(1).randbytes(IMAGE_BYTES))
    await run("nbdcopy", source, uri(served, "tcp"))
    await run("nbdcopy", "--request-size=1048576", uri(served, "unix"), copy)
    assert copy.read_bytes() == source.read_bytes()


async def test_nbdsh(served: Served) -> None:
    """One byte to 4 MiB, flush, holes."""
    script = f"""
import random
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates({str(ALICE)!r})
h.add_meta_context("base:allocation")
h.connect_uri({uri(served, "tcp", None)!r})
assert h.get_tls_negotiated()
for size in (1, 16384, 16385, 4 << 20):
    data = random.randbytes(size)
    h.pwrite(data, 5, nbd.CMD_FLAG_FUA)
    assert h.pread(size, 5) == data
h.flush()
h.zero(4 << 20, 0)
assert h.pread(4096, 0) == bytes(4096)
h.shutdown()
"""
    await run("nbdsh", "-c", script)


async def test_qemu(served: Served, tmp_path: Path) -> None:
    """qemu-img and qemu-io with --object tls-creds-x509."""
    port = served.addresses[1].rpartition(":")[2]
    creds = f"tls-creds-x509,id=tls0,endpoint=client,verify-peer=on,dir={ALICE}"
    options = f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=tls0"
    disk = ("--object", creds, "--image-opts", options)
    info = json.loads((await run("qemu-img", "info", "--output=json", *disk)).out)
    assert info["virtual-size"] == IMAGE_BYTES
    done = await run(
        "qemu-io",
        "--object",
        creds,
        "--image-opts",
        options,
        *("-c", "write -P 0x5a 4096 1M", "-c", "flush", "-c", "read -v -P 0x5a 4096 1M", "-c", "write -z 0 64k"),
    )
    assert "Pattern verification failed" not in done.out
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(2).randbytes(IMAGE_BYTES))
    await run("qemu-img", "convert", "-n", "-f", "raw", "--object", creds, "--target-image-opts", source, options)
    assert (
        await run(
            "qemu-img",
            "compare",
            "--object",
            creds,
            "--image-opts",
            options,
            f"driver=raw,file.driver=file,file.filename={source}",
        )
    ).code == 0


@pytest.mark.parametrize("server", ["ours", "nbdkit"])
async def test_the_cipher_that_is_agreed(served: Served, tmp_path: Path, server: str) -> None:
    """Ours and nbdkit's are the same, so that speed can be compared."""
    client: ssl.SSLContext = certificates().client()
    if server == "ours":
        async with served.connected() as connection:
            await connection.secure(client)
            assert connection.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
        return
    options = ("--tls=on", f"--tls-certificates={certificates().directory}", "--tls-verify-peer")
    async with serve_peer("nbdkit", Disk(), tmp_path, options) as peer, peer.connected() as connection:
        await connection.secure(client)
        assert connection.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
