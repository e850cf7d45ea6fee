"""proto.md, "Metadata querying", NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

import struct

import pytest

from tests.support.nbd_client import context_request
from tests.support.nbd_spec import Command, Err, Info, Option, Rep
from tests.support.serving import Served

ALLOCATION = "base:allocation"
BOTH = pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
REFUSED = (Rep.ERR_INVALID, Rep.ERR_TOO_BIG)


async def test_list_without_query_names_every_context(nbd_server: Served) -> None:
    """NBD_OPT_LIST_META_CONTEXT: zero queries MUST return all contexts available for the export."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert ALLOCATION in await client.list_contexts("", [])


@pytest.mark.parametrize("queries", [["base:"], [ALLOCATION], ["base:", ALLOCATION], ["x-none:here", ALLOCATION]])
async def test_list_matches_queries(nbd_server: Served, queries: list[str]) -> None:
    """ "base: metadata namespace": `base:` MUST be a wildcard when listing; a leaf selects its context."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert set(await client.list_contexts("", queries)) == {ALLOCATION}


@pytest.mark.parametrize("query", ["base:nothing", "base:ALLOCATION", "base:allocation:x", "x-mine:a", "unknown:"])
async def test_list_ignores_what_it_does_not_know(nbd_server: Served, query: str) -> None:
    """NBD_OPT_LIST_META_CONTEXT: unknown namespaces MUST be ignored, unknown leaves too; a lone ACK is left."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.list_contexts("", [query]) == []


async def test_list_selects_nothing(nbd_server: Served) -> None:
    """Only NBD_OPT_SET_META_CONTEXT selects: after a list BLOCK_STATUS SHOULD get NBD_EINVAL."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.list_contexts("", [ALLOCATION]) == [ALLOCATION]
        await client.go()
        assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL


async def test_set_selects_allocation(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT: one reply for the selected context, then NBD_REP_ACK; then it can be queried."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.set_contexts("", [ALLOCATION]) == Rep.ACK
        assert list(client.contexts.values()) == [ALLOCATION]
        await client.go()
        assert sum(length for length, _ in await client.status(0, 4096)) > 0


@pytest.mark.parametrize("queries", [[], ["base:"], ["base:nothing"], ["unknown:thing"], ["x-mine:", "base:"]])
async def test_set_may_select_nothing(nbd_server: Served, queries: list[str]) -> None:
    """NBD_OPT_SET_META_CONTEXT: no query, `base:`, an unknown leaf or namespace select nothing; that is no error."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.set_contexts("", queries) == Rep.ACK
        assert client.contexts == {}
        await client.go()
        assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL
        await client.still_serves()


async def test_set_twice_the_same_query(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT: one reply for each selected context, with a unique id (checked by the client)."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.set_contexts("", [ALLOCATION, ALLOCATION]) == Rep.ACK
        assert list(client.contexts.values()) == [ALLOCATION]


async def test_set_needs_structured_replies(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT: without structured replies the server SHOULD send NBD_REP_ERR_INVALID."""
    async with nbd_server.connected() as client:
        assert await client.set_contexts("", [ALLOCATION]) == Rep.ERR_INVALID
        await client.structured_replies()
        await client.go()
        assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL


async def test_list_without_structured_replies(nbd_server: Served) -> None:
    """NBD_OPT_LIST_META_CONTEXT: without structured replies the server MAY send NBD_REP_ERR_INVALID."""
    async with nbd_server.connected() as client:
        replies = await client.option(Option.LIST_META_CONTEXT, context_request("", []))
        assert replies[-1].type in (Rep.ACK, Rep.ERR_INVALID)
        await client.in_step()


@pytest.mark.parametrize("queries", [[], ["base:"], ["unknown:thing"]])
async def test_set_replaces_what_was_set(nbd_server: Served, queries: list[str]) -> None:
    """NBD_OPT_SET_META_CONTEXT replaces all contexts set before."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        await client.set_contexts("", [ALLOCATION])
        await client.set_contexts("", queries)
        await client.go()
        assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL


async def test_set_replaces_even_when_it_fails(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT replaces all contexts set before, including when the command fails."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        await client.set_contexts("", [ALLOCATION])
        assert await client.final(Option.SET_META_CONTEXT, b"\0") == Rep.ERR_INVALID
        await client.go()
        assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL


async def test_set_again_selects_again(nbd_server: Served) -> None:
    """NBD_OPT_SET_META_CONTEXT: the final time counts."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        await client.set_contexts("", [])
        await client.set_contexts("", [ALLOCATION])
        await client.info(infos=[Info.BLOCK_SIZE])
        await client.exports()
        await client.export_name()
        assert await client.status(0, 4096)


LYING_REQUESTS = {
    "no data": b"",
    "half a name length": b"\0\0",
    "name over the data": context_request("disk", [], name_length=9),
    "name of 4 GiB": context_request("", [ALLOCATION], name_length=0xFFFF_FFFF),
    "no query count": struct.pack(">I", 0),
    "half a query count": struct.pack(">IH", 0, 0),
    "a query more than sent": context_request("", [ALLOCATION], query_count=2),
    "2^32 - 1 queries": context_request("", [ALLOCATION], query_count=0xFFFF_FFFF),
    "query over the data": context_request("", [ALLOCATION], query_length=16),
    "query of 4 GiB": context_request("", [ALLOCATION], query_length=0xFFFF_FFFF),
}


@BOTH
@pytest.mark.parametrize("data", LYING_REQUESTS.values(), ids=LYING_REQUESTS.keys())
async def test_lying_lengths_are_invalid(nbd_server: Served, option: Option, data: bytes) -> None:
    """NBD_OPT_LIST_META_CONTEXT: a syntactically invalid request MUST fail with NBD_REP_ERR_INVALID."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.final(option, data) == Rep.ERR_INVALID
        await client.in_step()
        assert await client.set_contexts("", [ALLOCATION]) == Rep.ACK


@BOTH
@pytest.mark.parametrize("extra", [b"\0", struct.pack(">I", 5) + b"base:"])
async def test_bytes_behind_the_queries(nbd_server: Served, option: Option, extra: bytes) -> None:
    """The option's length covers them, so they are skipped whether or not the server minds them."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        assert await client.final(option, context_request("", [ALLOCATION]) + extra) in (Rep.ACK, Rep.ERR_INVALID)
        await client.in_step()


@BOTH
@pytest.mark.parametrize("query", [b"", b"base", b":", b":leaf", b"base:\xff\xfe", b"ba\0se:x", b"x" * 4097])
async def test_queries_without_meaning(nbd_server: Served, option: Option, query: bytes) -> None:
    """NBD_OPT_LIST_META_CONTEXT: a semantically invalid query MAY be NBD_REP_ERR_INVALID; else it matches nothing."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        replies = await client.option(option, context_request("", [query]))
        assert len(replies) == 1
        assert replies[0].type in (Rep.ACK, *REFUSED)
        await client.in_step()


@BOTH
async def test_many_queries(nbd_server: Served, option: Option) -> None:
    """NBD_REP_ERR_TOO_BIG is allowed for too many queries; a few dozen unknown ones hide nothing."""
    async with nbd_server.connected() as client:
        await client.structured_replies()
        few = [f"x-test:{index}" for index in range(30)]
        replies = await client.option(option, context_request("", [*few, ALLOCATION]))
        assert [reply.type for reply in replies] == [Rep.META_CONTEXT, Rep.ACK]
        many = context_request("", ["x-test:"] * 5000)
        replies = await client.option(option, many)
        assert [reply.type for reply in replies] in ([Rep.ACK], [Rep.ERR_TOO_BIG], [Rep.ERR_INVALID])
        await client.in_step()


@BOTH
async def test_unknown_export(one_named_disk: Served, option: Option) -> None:
    """The contexts asked for are those of an export: for one that does not exist the option fails."""
    async with one_named_disk.connected() as client:
        await client.structured_replies()
        (reply,) = await client.option(option, context_request("nobody", [ALLOCATION]))
        assert reply.type in (Rep.ERR_UNKNOWN, Rep.ERR_INVALID)
        await client.in_step()


async def test_contexts_belong_to_their_export(two_disks: Served) -> None:
    """NBD_CMD_BLOCK_STATUS: the last NBD_OPT_SET_META_CONTEXT must have named the export finally chosen."""
    first, second = (disk.name for disk in two_disks.disks)
    for enter in ("go", "export_name"):
        async with two_disks.connected() as client:
            await client.structured_replies()
            assert await client.set_contexts(first, [ALLOCATION]) == Rep.ACK
            await getattr(client, enter)(second)
            assert (await client.call(Command.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL
            await client.still_serves()
        async with two_disks.connected() as client:
            await client.structured_replies()
            assert await client.set_contexts(second, [ALLOCATION]) == Rep.ACK
            assert (await client.info(first)).accepted
            await getattr(client, enter)(second)
            assert await client.status(0, 4096)
