"""proto.md, "TLS support": the three modes, and what STARTTLS promises; RFC 8446 where the end of the stream counts."""

import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.spec.test_handshake_walk import OPTIONS
from tests.support.certificates import certificates
from tests.support.channel import Disconnected
from tests.support.nbd_client import attached, connected, context_request, export_request
from tests.support.nbd_spec import OPTION_HEADER, Command, Err, HandshakeFlag, Option, Rep
from tests.support.our_server import OurServed, serve, serve_volume
from tests.support.scripted_volume import ScriptedVolume
from tests.support.serving import Disk, eventually

ALLOCATION = "base:allocation"
IHAVEOPT = 0x49484156454F5054
WITHOUT_ANSWER = ("starttls", "abort")


@asynccontextmanager
async def server(directory: Path, mode: str, **settings: object) -> AsyncIterator[OurServed]:
    """One disk, in a TLS mode; clients must show a certificate in TLS."""
    async with serve([Disk()], directory, tls=certificates().server(mode), **settings) as served:
        yield served


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION_HEADER.pack(IHAVEOPT, number, len(data)) + data


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in WITHOUT_ANSWER])
async def test_forced_refuses_every_option(tmp_path: Path, name: str) -> None:
    """ "FORCEDTLS mode": any other option, unsupported ones included, MUST get NBD_REP_ERR_TLS_REQD; none after TLS."""
    number, data = OPTIONS[name]
    async with server(tmp_path, "forced") as served, served.connected() as client:
        assert [reply.type for reply in await client.option(number, data)] == [Rep.ERR_TLS_REQD]
        await client.secure(certificates().client())
        assert await client.final(number, data) != Rep.ERR_TLS_REQD
        assert (await client.go()).accepted


async def test_forced_refuses_go_and_over_long_options(tmp_path: Path) -> None:
    async with server(tmp_path, "forced") as served, served.connected() as client:
        for data in (export_request(""), export_request("nobody"), bytes(100_000)):
            assert await client.final(Option.GO, data) == Rep.ERR_TLS_REQD
        assert await client.final(Option.ABORT) == Rep.ACK
        await client.expect_orderly_close()


@pytest.mark.parametrize("flags", [HandshakeFlag.FIXED_NEWSTYLE, HandshakeFlag(0)])
async def test_forced_closes_on_export_name(tmp_path: Path, flags: HandshakeFlag) -> None:
    """ "FORCEDTLS mode": EXPORT_NAME can't be refused, so the session MUST be terminated."""
    async with server(tmp_path, "forced") as served, served.connected(flags=flags) as client:
        await client.send_option(Option.EXPORT_NAME)
        await client.expect_close()


@pytest.mark.parametrize("mode", ["selective", "forced"])
async def test_starttls_needs_fixed_newstyle(tmp_path: Path, mode: str) -> None:
    """ "Certificates": TLS requires fixed newstyle negotiation."""
    async with server(tmp_path, mode) as served, served.connected(flags=0) as client:
        await client.send_option(Option.STARTTLS)
        await client.expect_close()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in WITHOUT_ANSWER])
async def test_selective_requires_tls_for_nothing_else(tmp_path: Path, name: str) -> None:
    """ "SELECTIVETLS mode": no TLS_REQD but for INFO and GO of a TLS-only or unknown export."""
    number, data = OPTIONS[name]
    async with server(tmp_path, "selective") as served, served.connected() as client:
        assert await client.final(number, data) != Rep.ERR_TLS_REQD
        assert (await client.go()).accepted


async def test_selective_unknown_export(tmp_path: Path) -> None:
    """ "SELECTIVETLS mode": MAY be TLS_REQD before TLS for INFO and GO, for no other option, and for none after it."""
    async with server(tmp_path, "selective") as served, served.connected() as client:
        nobody = export_request("nobody")
        contexts = context_request("nobody", [ALLOCATION])
        assert await client.final(Option.INFO, nobody) == Rep.ERR_TLS_REQD
        assert await client.final(Option.GO, nobody) == Rep.ERR_TLS_REQD
        await client.structured_replies()
        assert await client.final(Option.SET_META_CONTEXT, contexts) == Rep.ERR_UNKNOWN
        await client.secure(certificates().client())
        await client.structured_replies()
        for number, data in ((Option.INFO, nobody), (Option.GO, nobody), (Option.SET_META_CONTEXT, contexts)):
            assert await client.final(number, data) == Rep.ERR_UNKNOWN
        assert (await client.go()).accepted


@pytest.mark.parametrize("mode", ["selective", "forced"])
async def test_second_starttls(tmp_path: Path, mode: str) -> None:
    """STARTTLS when TLS has been negotiated MUST get NBD_REP_ERR_INVALID."""
    async with server(tmp_path, mode) as served, served.connected() as client:
        await client.secure(certificates().client())
        assert await client.final(Option.STARTTLS) == Rep.ERR_INVALID
        assert (await client.go()).accepted
        await client.still_serves()


@pytest.mark.parametrize("mode", ["selective", "forced"])
@pytest.mark.parametrize("length", [1, 100_000])
async def test_starttls_with_data(tmp_path: Path, mode: str, length: int) -> None:
    """ "NBD_OPT_STARTTLS": the client MUST NOT send data with it, NBD_REP_ERR_INVALID if it does."""
    async with server(tmp_path, mode) as served, served.connected() as client:
        assert await client.final(Option.STARTTLS, bytes(length)) == Rep.ERR_INVALID
        await client.secure(certificates().client())
        assert (await client.go()).accepted


@pytest.mark.parametrize("kind", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
async def test_what_was_agreed_before_is_forgotten(tmp_path: Path, kind: Option) -> None:
    """ "NBD_OPT_STARTTLS": the server MUST NOT preserve any negotiation state issued before it."""
    async with server(tmp_path, "selective") as served, served.connected() as client:
        assert await client.final(kind) == Rep.ACK
        assert await client.set_contexts("", [ALLOCATION]) == Rep.ACK
        await client.secure(certificates().client())
        assert await client.final(Option.SET_META_CONTEXT, context_request("", [ALLOCATION])) == Rep.ERR_INVALID
        assert (await client.go()).accepted
        await client.write(0, b"plain")
        assert await client.read(0, 5) == b"plain"  # the client takes simple replies only
        assert (await client.call(Command.BLOCK_STATUS, 0, 512)).error == Err.EINVAL


@pytest.mark.parametrize("behind", [option(Option.STRUCTURED_REPLY), option(Option.GO, export_request("")), b"\0"])
@pytest.mark.parametrize("mode", ["selective", "forced"])
async def test_injected_plain_bytes_are_refused(tmp_path: Path, mode: str, behind: bytes) -> None:
    """Bytes that came in plain text behind STARTTLS must not count as if TLS had protected them."""
    async with server(tmp_path, mode) as served:
        async with served.connected() as client:
            await client.send(option(Option.STARTTLS) + behind)
            rest, _ = await client.receive_until_close()
            assert rest == b"", "nothing is promised to whoever sent this"
        async with served.connected() as client:
            await client.secure(certificates().client())
            assert (await client.go()).accepted


@pytest.mark.parametrize("plain", [option(Option.LIST), b"\x16\x03\x01\xff\xff", bytes(5)])
async def test_plain_bytes_instead_of_a_handshake(tmp_path: Path, plain: bytes) -> None:
    """ "FORCEDTLS mode": after the ACK all data MUST be TLS; a handshake that fails MUST end the session."""
    async with server(tmp_path, "forced", handshake_seconds=0.5) as served:
        async with served.connected() as client:
            assert await client.final(Option.STARTTLS) == Rep.ACK
            await client.send(plain)
            rest, _ = await client.receive_until_close()
            assert not rest.startswith(b"\0\3\xe8\x89"), "no option was answered"
        async with served.connected() as client:
            await client.secure(certificates().client())


async def test_a_tls_handshake_that_stalls_is_ended(tmp_path: Path) -> None:
    """It counts into the time that the whole handshake may take."""
    async with server(tmp_path, "forced", handshake_seconds=0.3) as served, served.connected() as client:
        assert await client.final(Option.STARTTLS) == Rep.ACK
        await client.send(b"\x16\x03\x01")
        await client.expect_close()


async def refused(address: str, context: ssl.SSLContext) -> bool:
    """Whether the server ends the session with a client of this context. In TLS 1.3 the client is done before the
    server has seen its certificate."""
    async with connected(address) as client:
        try:
            await client.secure(context)
            await client.exports()
        except (ssl.SSLError, Disconnected):
            return True
        return False


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions_and_certificates(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """ "TLS versions": 1.2 MUST be supported, later ones SHOULD. Who shows no certificate of the CA is not served."""
    contexts = [
        certificates().client(),
        certificates().client(None),
        certificates("other").client(),
    ]
    contexts[2].load_verify_locations(certificates().directory / "ca-cert.pem")
    for context in contexts:
        context.minimum_version = context.maximum_version = version
    async with server(tmp_path, "forced") as served:
        assert [await refused(served.address, context) for context in contexts] == [False, True, True]
        contexts[0].load_verify_locations(certificates("other").directory / "ca-cert.pem")
        async with attached(served.address, tls=contexts[0]) as client:
            await client.still_serves()


async def test_any_client_may_be_let_in(tmp_path: Path) -> None:
    async with serve([Disk()], tmp_path, tls=certificates().server(verify_clients=False)) as served:
        assert not await refused(served.address, certificates().client(None))


@pytest.mark.filterwarnings("ignore:.*TLSv1.* is deprecated:DeprecationWarning")
async def test_old_versions_are_refused(tmp_path: Path) -> None:
    """ "TLS versions": older ones SHOULD NOT be supported by default."""
    context = certificates().client()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with server(tmp_path, "forced") as served:
        assert await refused(served.address, context)


async def test_the_server_says_goodbye(tmp_path: Path) -> None:
    """ "Terminating the transmission phase": shut down TLS before the connection, after DISC, ABORT and a stop."""
    async with server(tmp_path, "forced") as served:
        served.tls = certificates().client()
        async with served.attached() as client:
            await client.send_disc()
            await client.expect_orderly_close()
            assert client.close_notify
        async with served.connected() as client:
            assert await client.final(Option.ABORT) == Rep.ACK
            await client.expect_orderly_close()
            assert client.close_notify
        async with served.attached() as client:
            await client.still_serves()
            await served.server.stop()
            await client.expect_orderly_close()
            assert client.close_notify


async def test_end_without_close_notify_is_no_orderly_end(tmp_path: Path) -> None:
    """RFC 8446, 6.1: who cuts the connection can't pretend that the client has said all it had to say."""
    volume = ScriptedVolume()
    async with serve_volume(volume, tmp_path, tls=certificates().server()) as served:
        served.tls = certificates().client()
        for cut in (True, False):
            volume.hold()
            async with served.attached() as client:
                pending = await client.submit(Command.READ, 0, 4096)
                await volume.arrived(1)
                if cut:
                    client.half_close_tcp()
                    await client.expect_close()
                    assert not client.close_notify
                    await volume.release()
                else:
                    client.half_close()
                    await volume.release()
                    assert (await client.wait(pending)).error == Err.OK
                    await client.expect_orderly_close()
                    assert client.close_notify


async def test_disc_in_front_of_a_hang_up_is_found(tmp_path: Path) -> None:
    """A write and DISC that were sent while the server could not read are done, although the peer has hung up."""
    volume = ScriptedVolume()
    async with serve_volume(volume, tmp_path, tls=certificates().server(), requests_in_flight_max=1) as served:
        served.tls = certificates().client()
        volume.hold()
        async with served.attached() as client:
            await client.submit(Command.READ, 0, 4096)
            await volume.arrived(1)
            await client.submit(Command.WRITE, 0, payload=b"last words")
            await client.send_disc()
            client.half_close()
        await volume.release()
        await eventually(lambda: not served.server.clients())
        async with served.attached() as other:
            assert await other.read(0, 10) == b"last words"


@pytest.mark.parametrize("garbage", [bytes(100), b"\x17\x03\x03\x00\x20" + bytes(32), b"\x17\x03\x03\xff\xff"])
async def test_records_that_were_tampered_with_end_the_connection(tmp_path: Path, garbage: bytes) -> None:
    async with server(tmp_path, "forced") as served:
        served.tls = certificates().client()
        async with served.attached() as client:
            await client.write(0, b"kept")
            await client.send_plain(garbage)
            await client.receive_until_close()
        async with served.attached() as other:
            assert await other.read(0, 4) == b"kept"


async def test_certificates_are_exchanged_under_open_connections(tmp_path: Path) -> None:
    """New connections meet the new ones, those that are open go on; none go on with what the old CA has signed."""
    old, new = certificates(), certificates("other")
    async with server(tmp_path, "forced") as served, attached(served.address, tls=old.client()) as client:
        await client.write(0, b"before")
        served.server.use_tls(new.server("forced"))
        async with attached(served.address, tls=new.client()) as other:
            assert await other.read(0, 6) == b"before"
        assert await refused(served.address, old.client())
        await client.still_serves()
        served.server.use_tls(None)
        async with attached(served.address) as other:
            assert await other.read(0, 6) == b"before"
        await client.still_serves()


async def test_a_client_is_known_by_its_certificate(tmp_path: Path) -> None:
    async with server(tmp_path, "selective") as served:
        peers = []
        for name in ("alice", "bob", None):
            with contextlib.suppress(Disconnected, ssl.SSLError):
                async with attached(served.address, tls=certificates().client(name) if name else None):
                    (connection,) = served.server._connections
                    peers.append(connection.peer.client.partition(":"))
            await eventually(lambda: not served.server.clients())
        assert peers[:2] == [("certificate", ":", "CN=alice"), ("certificate", ":", "CN=bob")]
        assert peers[2][0] == "uid"
