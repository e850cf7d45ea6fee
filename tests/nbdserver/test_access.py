"""Who may see, read and write an export; what others get to hear; how many, and one writer at a time."""

import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdserver.access import OPEN, Access, Attachments, ExportRules, Right, Who
from nbdserver.identity import Peer
from nbdserver.keepalive import ONE_WRITER
from objstore.errors import InvalidRequest
from tests.conftest import ExpectedWarnings
from tests.support.certificates import certificates
from tests.support.nbd_client import NbdClient, attached, connected, context_request, export_request
from tests.support.nbd_spec import Command, Err, ExportFlag, Option, Rep
from tests.support.our_server import OurServed, serve
from tests.support.serving import MIB, Disk, eventually

ALICE = Peer(
    "1", address="10.1.2.3", certificate="CN=alice,O=Example", names=frozenset({"alice", "CN=alice,O=Example"})
)
LOCAL = Peer("2", uid=1000)
GUEST = Peer("3", address="vsock:3")
SIXTH = Peer("4", address="2001:db8::1")
MAPPED = Peer("5", address="::ffff:10.1.2.3")
ANYONE = (Who(anyone=True),)
NOBODY = (Who(certificate="nobody"),)


@pytest.mark.parametrize(
    ("who", "fitting"),
    [
        (Who(anyone=True), [ALICE, LOCAL, GUEST, SIXTH, MAPPED]),
        (Who(certificate="alice"), [ALICE]),
        (Who(certificate="CN=alice,O=Example"), [ALICE]),
        (Who(certificate="CN=alice"), []),
        (Who(address="10.1.2.3"), [ALICE, MAPPED]),
        (Who(address="10.1.0.0/16"), [ALICE, MAPPED]),
        (Who(address="10.2.0.0/16"), []),
        (Who(address="0.0.0.0/0"), [ALICE, MAPPED]),
        (Who(address="::/0"), [SIXTH]),
        (Who(address="2001:db8::/32"), [SIXTH]),
        (Who(uid=1000), [LOCAL]),
        (Who(uid=0), []),
        (Who(certificate="alice", address="10.0.0.0/8"), [ALICE]),
        (Who(certificate="alice", address="192.168.0.0/16"), []),
        (Who(certificate="alice", uid=1000), []),
    ],
)
def test_who_is_meant(who: Who, fitting: list[Peer]) -> None:
    assert [peer for peer in (ALICE, LOCAL, GUEST, SIXTH, MAPPED) if who.fits(peer)] == fitting


def test_a_link_local_address_with_its_interface() -> None:
    assert Who(address="fe80::/10").fits(Peer("6", address="fe80::1%eth0"))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"anyone": True, "uid": 1},
        {"certificate": ""},
        {"uid": -1},
        {"address": "10.0.0.1/8"},
        {"address": "host.example"},
        {"address": ""},
    ],
)
def test_nobody_can_be_meant(given: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"^[^\n]+$"):
        Who(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "right"),
    [
        (ExportRules(), Right.WRITE),
        (ExportRules(one_writer=True, connections_max=1), Right.WRITE),
        (ExportRules(write=(Who(uid=1000),)), Right.WRITE),
        (ExportRules(read=(Who(uid=1000),), write=(Who(uid=1000),)), Right.WRITE),
        (ExportRules(read=(Who(uid=1000),)), Right.READ),
        (ExportRules(read=(Who(uid=1000),), write=NOBODY), Right.READ),
        (ExportRules(see=(Who(uid=1000),), write=NOBODY), Right.SEE),
        (ExportRules(see=(Who(uid=1000),)), Right.SEE),
        (ExportRules(write=NOBODY), Right.NOTHING),
        (ExportRules(read=NOBODY), Right.NOTHING),
        (ExportRules(see=NOBODY, read=(Who(address="10.0.0.0/8"),)), Right.NOTHING),
    ],
)
def test_rights(rules: ExportRules, right: Right) -> None:
    assert rules.right(LOCAL, secure=False) is right


def test_tls_only() -> None:
    rules = ExportRules(tls=True)
    assert rules.right(ALICE, secure=False) is Right.NOTHING
    assert rules.right(ALICE, secure=True) is Right.WRITE


def test_whose_rules_are_whose() -> None:
    """A snapshot shows what its VDI held: without rules of its own it has the VDI's."""
    disk, tagged, others = (ExportRules(connections_max=number) for number in (1, 2, 3))
    access = Access({"disk": disk, "disk@open": tagged, "*": others})
    assert access.of("disk") is disk
    assert access.of("disk@t1") is disk
    assert access.of("disk@open") is tagged
    assert access.of("disk2") is others
    assert access.of("other@open") is others
    assert Access({"disk": disk}).of("other") is OPEN
    assert Access().of("disk") is OPEN


@pytest.mark.parametrize(
    ("rules", "tls", "certified", "named"),
    [
        (ExportRules(tls=True), False, False, "access.disk: tls = true"),
        (ExportRules(read=(Who(certificate="a"),)), True, False, "access.disk names a certificate"),
        (ExportRules(tls=True, see=(Who(certificate="a"),)), True, True, None),
        (ExportRules(write=(Who(uid=1),)), False, False, None),
    ],
)
def test_rules_that_nobody_could_meet(rules: ExportRules, tls: bool, certified: bool, named: str | None) -> None:
    access = Access({"disk": rules})
    if named is None:
        access.check(tls=tls, certificates=certified)
        return
    with pytest.raises(InvalidRequest, match=named):
        access.check(tls=tls, certificates=certified)


class Somebody:
    """A connection as others see it."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.here = True

    def present(self) -> bool:
        return self.here


def test_one_writer_is_a_client_with_any_number_of_connections() -> None:
    attachments, volume = Attachments(), object()
    rules = ExportRules(one_writer=True)
    first, again, other, reader = Somebody("a"), Somebody("a"), Somebody("b"), Somebody("c")
    assert attachments.attach(reader, volume, rules, writes=False) is None
    assert attachments.attach(first, volume, rules, writes=True) is None
    assert attachments.attach(again, volume, rules, writes=True) is None
    assert "now a" in (attachments.attach(other, volume, rules, writes=True) or "")
    assert attachments.attach(other, object(), rules, writes=True) is None
    attachments.detach(first, volume)
    assert attachments.attach(other, volume, rules, writes=True) is not None
    again.here = False
    assert attachments.attach(other, volume, rules, writes=True) is None, "who is about to end holds nobody up"


def test_connections_are_counted() -> None:
    attachments, volume = Attachments(), object()
    rules = ExportRules(connections_max=2)
    one, two, three = Somebody("a"), Somebody("a"), Somebody("a")
    assert attachments.attach(one, volume, rules, writes=True) is None
    assert attachments.attach(two, volume, rules, writes=False) is None
    assert "connections_max = 2" in (attachments.attach(three, volume, rules, writes=False) or "")
    attachments.detach(three, volume)
    attachments.detach(one, volume)
    attachments.detach(one, volume)
    assert attachments.attach(three, volume, rules, writes=False) is None
    for somebody in (two, three):
        attachments.detach(somebody, volume)
    assert attachments._on == {}


# Over a socket

ME = (Who(uid=os.geteuid()),)


@asynccontextmanager
async def server(
    directory: Path, rules: dict[str, ExportRules], *, mode: str = "", listen: tuple[str, ...] = ("unix",)
) -> AsyncIterator[OurServed]:
    """Two disks, `disk` (the default) and `other`."""
    disks = [Disk(), Disk("other", 8 * MIB)]
    tls = certificates().server(mode) if mode else None
    async with serve(disks, directory, listen=listen, tls=tls, access=Access(rules)) as served:
        yield served


async def everything_about(client: NbdClient, name: str) -> list[bytes]:
    """All that a client can get to know of an export without being in, with the name taken out of the texts."""
    said = []
    for option, data in (
        (Option.INFO, export_request(name, [0, 1, 2, 3])),
        (Option.GO, export_request(name)),
        (Option.LIST_META_CONTEXT, context_request(name, [])),
        (Option.SET_META_CONTEXT, context_request(name, ["base:allocation"])),
    ):
        for reply in await client.option(option, data):
            said.append(b"%d %d " % (option, reply.type) + reply.data.replace(name.encode(), b"NAME"))
    return said


async def closes(address: str, name: str) -> bool:
    """EXPORT_NAME: nothing but the end of the connection."""
    async with connected(address) as client:
        await client.send_option(Option.EXPORT_NAME, name.encode())
        rest, reset = await client.receive_until_close()
        return rest == b"" and not reset


@pytest.mark.parametrize("mode", ["", "selective"])
@pytest.mark.parametrize("rules", [ExportRules(write=NOBODY), ExportRules(tls=True)])
async def test_who_may_not_see_an_export_is_told_what_is_told_of_a_missing_one(
    tmp_path: Path, mode: str, rules: ExportRules
) -> None:
    if rules.tls and not mode:
        rules = ExportRules(read=NOBODY, see=NOBODY)
    async with server(tmp_path, {"other": rules}, mode=mode) as served:
        async with served.connected() as client:
            await client.structured_replies()
            assert [name for name, _ in await client.exports()] == ["disk"]
            assert await everything_about(client, "other") == await everything_about(client, "absent")
        assert await closes(served.address, "other")
        assert await closes(served.address, "absent")


async def test_who_may_see_it_only_is_told_why(tmp_path: Path) -> None:
    async with server(tmp_path, {"other": ExportRules(see=ME, write=NOBODY)}) as served:
        async with served.connected() as client:
            await client.structured_replies()
            assert [name for name, _ in await client.exports()] == ["disk", "other"]
            for option, data in (
                (Option.INFO, export_request("other")),
                (Option.GO, export_request("other")),
                (Option.SET_META_CONTEXT, context_request("other", ["base:allocation"])),
            ):
                (reply,) = await client.option(option, data)
                assert reply.type == Rep.ERR_POLICY
                assert f"uid:{os.geteuid()} may see this export, not use it" in reply.data.decode()
        assert await closes(served.address, "other")


async def test_read_only_for_some(tmp_path: Path) -> None:
    """The same export, read-only for one client and writable for another."""
    rules = {"disk": ExportRules(read=(Who(certificate="bob"),), write=(Who(certificate="alice"),))}
    async with server(tmp_path, rules, mode="forced") as served:
        async with (
            attached(served.address, "disk", tls=certificates().client("alice")) as alice,
            attached(served.address, "disk", tls=certificates().client("bob")) as bob,
        ):
            assert not alice.flags & ExportFlag.READ_ONLY
            assert bob.flags & ExportFlag.READ_ONLY
            assert not bob.flags & ExportFlag.SEND_TRIM
            await alice.write(0, b"of alice")
            assert await bob.read(0, 8) == b"of alice"
            for command, payload in ((Command.WRITE, b"x" * 200_000), (Command.WRITE, b"x"), (Command.TRIM, None)):
                reply = await bob.call(command, 0, 0 if payload else 4096, payload=payload)
                assert reply.error == Err.EPERM
            assert (await bob.call(Command.WRITE_ZEROES, 0, 4096)).error == Err.EPERM
            await bob.flush()
            assert await alice.read(0, 8) == b"of alice"
        async with connected(served.address, tls=certificates().client("bob")) as bob:
            info = await bob.info("disk")
            assert info.flags & ExportFlag.READ_ONLY


async def test_certificates_addresses_and_users(tmp_path: Path) -> None:
    rules = {
        "disk": ExportRules(write=(Who(address="127.0.0.0/8"),)),
        "other": ExportRules(write=(*ME, Who(certificate="alice"))),
    }
    async with server(tmp_path, rules, mode="selective", listen=("unix", "tcp")) as served:
        unix, tcp = served.addresses

        async def visible(address: str, name: str | None) -> list[str]:
            tls = None if name is None else certificates().client(name)
            async with connected(address, tls=tls) as client:
                return [export for export, _ in await client.exports()]

        assert await visible(unix, None) == ["other"]
        assert await visible(tcp, None) == ["disk"]
        assert await visible(tcp, "bob") == ["disk"]
        assert await visible(tcp, "alice") == ["disk", "other"]


async def test_tls_only_export(tmp_path: Path) -> None:
    """proto.md, "SELECTIVETLS mode": TLS_REQD for INFO and GO, EXPORT_NAME ends the session, LIST leaves it out."""
    async with server(tmp_path, {"other": ExportRules(tls=True)}, mode="selective") as served:
        async with served.connected() as client:
            assert [name for name, _ in await client.exports()] == ["disk"]
            assert await client.final(Option.INFO, export_request("other")) == Rep.ERR_TLS_REQD
            assert await client.final(Option.GO, export_request("other")) == Rep.ERR_TLS_REQD
            await client.structured_replies()
            contexts = context_request("other", ["base:allocation"])
            assert await client.final(Option.SET_META_CONTEXT, contexts) == Rep.ERR_UNKNOWN
            await client.secure(certificates().client())
            assert [name for name, _ in await client.exports()] == ["disk", "other"]
            assert (await client.go("other")).accepted
        assert await closes(served.address, "other")


async def test_the_default_is_what_a_client_may_see(tmp_path: Path) -> None:
    """Nobody gets to an export by not naming it."""
    async with (
        server(tmp_path, {"disk": ExportRules(write=NOBODY)}) as served,
        served.connected() as client,
    ):
        assert await client.final(Option.GO, export_request("")) == Rep.ERR_UNKNOWN
        served.server.use_access(Access({"disk": ExportRules(read=ANYONE)}))
        info = await client.go("")
        assert info.accepted
        assert info.flags & ExportFlag.READ_ONLY


async def test_connections_of_an_export_are_limited(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("connections_max = 1")
    async with server(tmp_path, {"other": ExportRules(connections_max=1)}) as served:
        async with served.attached("other"), served.connected() as second:
            (reply,) = await second.option(Option.GO, export_request("other"))
            assert reply.type == Rep.ERR_POLICY
            assert "connections_max = 1" in reply.data.decode()
            assert (await second.go("disk")).accepted
        async with served.attached("other") as after:
            await after.still_serves()


async def test_one_writer(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    """Two connections of one client, not two clients; who comes after it has hung up gets in at once."""
    expected_warnings.allow("one writer at a time")
    rules = {"other": ExportRules(one_writer=True)}
    alice, bob = certificates().client("alice"), certificates().client("bob")
    async with server(tmp_path, rules, mode="forced", listen=("unix", "tcp")) as served:
        tcp = served.addresses[1]
        async with attached(tcp, "other", tls=alice) as first, attached(served.address, "other", tls=alice) as second:
            (connection, *_) = served.server._connections
            sock: socket.socket = connection._sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == ONE_WRITER.idle_seconds
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) < 30_000
            await first.write(0, b"first")
            assert await second.read(0, 5) == b"first"
            async with connected(tcp, tls=bob) as refused:
                (reply,) = await refused.option(Option.GO, export_request("other"))
                assert reply.type == Rep.ERR_POLICY
                assert re.search("one writer at a time, now certificate:CN=alice", reply.data.decode())
            first.reset()
            second.close()
            await eventually(lambda: not any(one.present() for one in served.server._connections))
            async with attached(tcp, "other", tls=bob) as newcomer:
                assert await newcomer.read(0, 5) == b"first"
                await newcomer.write(0, b"newer")


async def test_rules_change_for_those_who_come(tmp_path: Path) -> None:
    async with server(tmp_path, {}) as served, served.attached("other") as here:
        served.server.use_access(Access({"*": ExportRules(read=ANYONE)}))
        async with served.attached("other") as newcomer:
            assert newcomer.flags & ExportFlag.READ_ONLY
        await here.write(0, b"as agreed")
