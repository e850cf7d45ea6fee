"""Every state of option haggling crossed with every option, well-formed and not: the reply that proto.md asks for.

A state is reached by a list of options; each cell is one connection. After a refused option haggling goes on, after an
accepted one the state is the expected one: a GO at the end shows which kind of reply was negotiated.
"""

import struct

import pytest

from tests.support.nbd_client import NbdClient, context_request, export_request
from tests.support.nbd_spec import Command, Err, Option, Rep
from tests.support.serving import Served

ALLOCATION = "base:allocation"
SET = context_request("", [ALLOCATION])

STATES: dict[str, list[tuple[int, bytes]]] = {
    "fresh": [],
    "structured": [(Option.STRUCTURED_REPLY, b"")],
    "structured with context": [(Option.STRUCTURED_REPLY, b""), (Option.SET_META_CONTEXT, SET)],
    "extended": [(Option.EXTENDED_HEADERS, b"")],
    "extended with context": [(Option.EXTENDED_HEADERS, b""), (Option.SET_META_CONTEXT, SET)],
    "structured, then extended": [(Option.STRUCTURED_REPLY, b""), (Option.EXTENDED_HEADERS, b"")],
    "after an error": [(77, b"unknown")],
}

OPTIONS: dict[str, tuple[int, bytes]] = {
    "abort": (Option.ABORT, b""),
    "list": (Option.LIST, b""),
    "list with data": (Option.LIST, b"x"),
    "peek": (Option.PEEK_EXPORT, struct.pack(">I", 0)),
    "starttls": (Option.STARTTLS, b""),
    "info": (Option.INFO, export_request("")),
    "malformed info": (Option.INFO, b"\0\0\0\5"),
    "malformed go": (Option.GO, b"\0\0\0\5"),
    "structured reply": (Option.STRUCTURED_REPLY, b""),
    "structured reply with data": (Option.STRUCTURED_REPLY, b"x"),
    "list contexts": (Option.LIST_META_CONTEXT, context_request("", [])),
    "malformed list contexts": (Option.LIST_META_CONTEXT, b"\0"),
    "set contexts": (Option.SET_META_CONTEXT, SET),
    "malformed set contexts": (Option.SET_META_CONTEXT, b"\0"),
    "extended headers": (Option.EXTENDED_HEADERS, b""),
    "extended headers with data": (Option.EXTENDED_HEADERS, b"x"),
    "unknown": (5000, b"data"),
}

ALWAYS: dict[str, set[Rep]] = {
    "abort": {Rep.ACK},
    "list": {Rep.ACK},
    "list with data": {Rep.ERR_INVALID},
    "peek": {Rep.ERR_UNSUP},
    "starttls": {Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_PLATFORM},
    "info": {Rep.ACK},
    "malformed info": {Rep.ERR_INVALID},
    "malformed go": {Rep.ERR_INVALID},
    "structured reply with data": {Rep.ERR_INVALID, Rep.ERR_EXT_HEADER_REQD},
    "malformed list contexts": {Rep.ERR_INVALID},
    "malformed set contexts": {Rep.ERR_INVALID},
    "extended headers with data": {Rep.ERR_INVALID},
    "unknown": {Rep.ERR_UNSUP},
}


def expected(state: str, option: str) -> set[Rep]:
    """Final replies that the text allows in this cell."""
    chunked = "structured" in state or "extended" in state
    if option == "structured reply":
        if "extended" in state:
            return {Rep.ERR_EXT_HEADER_REQD}
        return {Rep.ACK, Rep.ERR_INVALID} if chunked else {Rep.ACK}
    if option == "list contexts":
        return {Rep.ACK} if chunked else {Rep.ACK, Rep.ERR_INVALID}
    if option == "set contexts":
        return {Rep.ACK} if chunked else {Rep.ERR_INVALID, Rep.ERR_EXT_HEADER_REQD}
    if option == "extended headers":
        return {Rep.ACK, Rep.ERR_INVALID} if "extended" in state else {Rep.ACK}
    return ALWAYS[option]


async def bring_to(client: NbdClient, state: str) -> None:
    for number, data in STATES[state]:
        await client.option(number, data)
        client.structured |= number == Option.STRUCTURED_REPLY
        client.extended |= number == Option.EXTENDED_HEADERS
        if number == Option.SET_META_CONTEXT:
            client.contexts = {0: ALLOCATION}


async def in_transmission(client: NbdClient, context: bool) -> None:
    """Enter transmission; replies must be of the negotiated kind (checked by the client)."""
    assert (await client.go()).accepted
    await client.write(0, b"walk")
    assert await client.read(0, 4) == b"walk"
    if not context:
        assert (await client.call(Command.BLOCK_STATUS, 0, 512)).error == Err.EINVAL


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("state", STATES)
async def test_walk(nbd_server: Served, state: str, option: str) -> None:
    """ "Option types": the reply in each cell, and the state after it."""
    number, data = OPTIONS[option]
    async with nbd_server.connected() as client:
        await bring_to(client, state)
        final = await client.final(number, data)
        allowed = {Rep.ERR_INVALID} if option == "starttls" and nbd_server.tls is not None else expected(state, option)
        assert final in allowed, final.name
        if option == "abort":
            await client.expect_orderly_close()
            return
        await client.in_step()
        if final == Rep.ACK:
            client.structured |= option == "structured reply"
            client.extended |= option == "extended headers"
        chosen = "context" in state or (option == "set contexts" and final == Rep.ACK)
        if "context" in state and option in ("structured reply", "extended headers"):
            return  # whether contexts outlive a change of the reply's form is not specified
        await in_transmission(client, chosen and option != "malformed set contexts")


@pytest.mark.parametrize("state", [state for state in STATES if "extended" not in state])
async def test_export_name_from_every_state(nbd_server: Served, state: str) -> None:
    """NBD_OPT_EXPORT_NAME enters transmission with what was negotiated before."""
    async with nbd_server.connected() as client:
        await bring_to(client, state)
        await client.export_name()
        await client.write(0, b"walk")
        assert await client.read(0, 4) == b"walk"


@pytest.mark.parametrize("state", [state for state in STATES if "extended" in state])
async def test_export_name_is_forbidden_with_extended_headers(nbd_server: Served, state: str) -> None:
    """NBD_OPT_EXTENDED_HEADERS (branch text): the client MUST NOT use EXPORT_NAME then, which can't return an error."""
    async with nbd_server.connected() as client:
        await bring_to(client, state)
        await client.send_option(Option.EXPORT_NAME)
        await client.expect_close()
    await nbd_server.others_are_served()
