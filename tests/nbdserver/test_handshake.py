"""The handshake's table: every pair of state and option, lying lengths, limits, and what is remembered."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.exports import BLOCK_SIZES_BYTES
from nbdserver.handshake import OPTION_BYTES_MAX, OPTIONS_MAX, TABLE, Handshake, State, description
from nbdserver.wire import options as wire
from nbdserver.wire.constants import (
    Info,
    Option,
    OptionReply,
    ProtocolError,
    TransmissionFlag,
)
from objstore.volume.base import VolumeInfo
from tests.nbdserver.machines import FIXED, Haggler, context_data, exports, info_data, option, replies

ACK = [OptionReply.ACK]
INVALID = [OptionReply.ERR_INVALID]
UNKNOWN = [OptionReply.ERR_UNKNOWN]
UNSUP = [OptionReply.ERR_UNSUP]

GOOD_DATA: dict[int, bytes] = {
    Option.EXPORT_NAME: b"disk",
    Option.INFO: info_data(b"disk"),
    Option.GO: info_data(b"disk"),
    Option.LIST_META_CONTEXT: context_data(b"disk"),
    Option.SET_META_CONTEXT: context_data(b"disk", b"base:allocation"),
}
ANSWERS: dict[int, list[OptionReply]] = {
    Option.ABORT: ACK,
    Option.LIST: [OptionReply.SERVER, OptionReply.ACK],
    Option.PEEK_EXPORT: UNSUP,
    Option.STARTTLS: UNSUP,
    Option.INFO: [OptionReply.INFO, OptionReply.INFO, OptionReply.ACK],
    Option.STRUCTURED_REPLY: ACK,
    Option.LIST_META_CONTEXT: INVALID,
    Option.SET_META_CONTEXT: INVALID,
    Option.EXTENDED_HEADERS: ACK,
}
"""To a client that has negotiated nothing yet."""

EVERY_OPTION = [*Option, 0, 12, 99, 0xFFFFFFFF]


def haggler(*, flags: int = FIXED, extended: bool = True) -> Haggler:
    return Haggler(Handshake(exports("disk"), extended=extended), flags)


@pytest.mark.parametrize("number", EVERY_OPTION)
def test_every_option_to_a_fixed_newstyle_client(number: int) -> None:
    client = haggler()
    found = client.ask(number, GOOD_DATA.get(number, b""))
    if number in (Option.EXPORT_NAME, Option.GO):
        assert found == []
        assert client.entering == "disk"
        assert client.handshake.state is State.OPENING
    else:
        assert [kind for _, kind, _ in found] == ANSWERS.get(number, UNSUP)
        assert all(echo == number for echo, _, _ in found)
        assert client.handshake.state is (State.CLOSED if number == Option.ABORT else State.OPTIONS)


@pytest.mark.parametrize("number", EVERY_OPTION)
def test_every_option_to_a_client_without_fixed_newstyle(number: int) -> None:
    client = haggler(flags=0)
    if number == Option.EXPORT_NAME:
        client.ask(number, b"disk")
        assert client.entering == "disk"
        assert client.enter() == struct.pack(">QH", 1 << 20, flags_of()) + bytes(124)
    else:
        with pytest.raises(ProtocolError):
            client.ask(number, GOOD_DATA.get(number, b""))


@pytest.mark.parametrize("state", [State.OPENING, State.TRANSMISSION, State.CLOSED])
def test_no_option_is_taken_outside_of_haggling(state: State) -> None:
    client = haggler()
    if state is State.CLOSED:
        client.ask(Option.ABORT)
    else:
        client.ask(Option.GO, info_data(b"disk"))
        if state is State.TRANSMISSION:
            client.enter()
    assert client.handshake.state is state
    assert client.send(option(Option.LIST)) == b""
    assert client.handshake.take_rest() == option(Option.LIST)


def test_the_table_names_only_states_that_haggle() -> None:
    assert {state for state, _ in TABLE} == {State.NEWSTYLE, State.OPTIONS}
    assert [number for state, number in TABLE if state is State.NEWSTYLE] == [Option.EXPORT_NAME]


@pytest.mark.parametrize("flags", [4, 0x80000000, FIXED | 8])
def test_unknown_client_flags(flags: int) -> None:
    with pytest.raises(ProtocolError):
        haggler(flags=flags)


def test_bad_option_magic() -> None:
    with pytest.raises(ProtocolError):
        haggler().send(bytes(16))


def flags_of(*, structured: bool = False, status_payload: bool = False, read_only: bool = False) -> int:
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
    )
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    if structured:
        flags |= TransmissionFlag.SEND_DF
    if status_payload:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return int(flags)


@pytest.mark.parametrize("negotiated", [(), (Option.STRUCTURED_REPLY,), (Option.EXTENDED_HEADERS,)])
@pytest.mark.parametrize("context", [b"", b"base:allocation", b"base:other"])
@pytest.mark.parametrize("wanted", [(), (Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION, 77, Info.NAME)])
def test_info_and_go_agree(negotiated: tuple[int, ...], context: bytes, wanted: tuple[int, ...]) -> None:
    client = haggler()
    for number in negotiated:
        client.ask(number)
    if context:
        client.ask(Option.SET_META_CONTEXT, context_data(b"disk", context))
    told = client.ask(Option.INFO, info_data(b"", *wanted))
    client.ask(Option.GO, info_data(b"", *wanted))
    entered = replies(client.enter())
    assert [(kind, data) for _, kind, data in told] == [(kind, data) for _, kind, data in entered]
    assert client.handshake.state is State.TRANSMISSION
    infos = {struct.unpack_from(">H", data)[0]: data[2:] for _, kind, data in told if kind == OptionReply.INFO}
    extended = Option.EXTENDED_HEADERS in negotiated
    payload = extended and context == b"base:allocation"
    assert infos[Info.EXPORT] == struct.pack(
        ">QH", 1 << 20, flags_of(structured=bool(negotiated), status_payload=payload)
    )
    assert infos[Info.BLOCK_SIZE] == struct.pack(">III", *BLOCK_SIZES_BYTES)
    assert infos.get(Info.NAME) == (b"disk" if wanted else None)
    assert infos.get(Info.DESCRIPTION) == (b"in memory" if wanted else None)
    agreement = client.handshake.agreement
    assert agreement.extended == extended
    assert agreement.structured == (Option.STRUCTURED_REPLY in negotiated)
    chosen = bool(negotiated) and context == b"base:allocation"
    assert agreement.contexts == (((1, "base:allocation"),) if chosen else ())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 5) + b"disk" + bytes(2),
        struct.pack(">I", 0xFFFFFFFF) + b"disk" + bytes(2),
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I", 4) + b"disk\0",
        struct.pack(">I", 4) + b"disk\0\1",
        struct.pack(">I", 4) + b"disk\0\0\0",
        info_data(b"di\0k"),
        info_data(b"\xff\xfe"),
        info_data(b"n" * 4097),
    ],
)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_malformed_info_requests(number: int, data: bytes) -> None:
    client = haggler()
    assert client.kinds(number, data) == INVALID
    assert client.kinds(99) == UNSUP


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I", 9) + b"disk" + bytes(4),
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I", 4) + b"disk" + struct.pack(">I", 1),
        struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 4) + b"disk" + struct.pack(">II", 1, 0xFFFFFFFF) + b"base:",
        context_data(b"disk", b"base:allocation") + b"more",
        context_data(b"disk", b"nocolon"),
        context_data(b"disk", b":leaf"),
        context_data(b"disk", b"x-a:\xff"),
        context_data(b"disk", b"x-a:" + b"q" * 4096),
    ],
)
@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_malformed_context_requests(number: int, data: bytes) -> None:
    client = haggler()
    client.ask(Option.STRUCTURED_REPLY)
    assert client.kinds(number, data) == INVALID
    assert client.kinds(99) == UNSUP


@given(data=st.binary(max_size=80), number=st.sampled_from(list(Option)), negotiated=st.booleans())
def test_any_data_leaves_the_handshake_in_step(data: bytes, number: int, negotiated: bool) -> None:
    client = haggler()
    if negotiated:
        client.ask(Option.EXTENDED_HEADERS)
    try:
        found = client.ask(number, data)
    except ProtocolError:
        assert number == Option.EXPORT_NAME
        return
    if client.entering is None and number != Option.ABORT:
        assert found[-1][1] != OptionReply.INFO
        assert client.kinds(99) == UNSUP


@pytest.mark.parametrize(
    "number", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.ABORT]
)
def test_data_with_options_that_have_none(number: int) -> None:
    assert haggler().kinds(number, b"x") == (ACK if number == Option.ABORT else INVALID)


@pytest.mark.parametrize("number", [*Option, 99])
def test_over_long_options_are_skipped(number: int) -> None:
    client = haggler()
    length = OPTION_BYTES_MAX + 1
    if number == Option.EXPORT_NAME:
        with pytest.raises(ProtocolError):
            client.send(option(number, length=length))
        return
    answer = {
        Option.ABORT: ACK,
        Option.PEEK_EXPORT: UNSUP,
        99: UNSUP,
        Option.STARTTLS: [OptionReply.ERR_INVALID],  # which has no data at all
    }.get(number, [OptionReply.ERR_TOO_BIG])
    output = b""
    for piece in (option(number, length=length), bytes(length - 1), b"\0"):
        output += client.send(piece)
    assert [kind for _, kind, _ in replies(output)] == answer
    if number != Option.ABORT:
        assert client.kinds(Option.STRUCTURED_REPLY) == ACK


def test_skipped_bytes_are_not_kept() -> None:
    client = haggler()
    client.send(option(99, length=0xFFFFFFFF))
    for _ in range(100):
        client.send(bytes(1 << 16))
    assert client.handshake.take_rest() == b""


def test_options_may_come_in_any_pieces() -> None:
    client = haggler()
    stream = option(Option.STRUCTURED_REPLY) + option(99, b"data") + option(Option.INFO, info_data(b"disk"))
    output = b"".join(client.send(stream[at : at + 1]) for at in range(len(stream)))
    assert [kind for _, kind, _ in replies(output)] == [*ACK, *UNSUP, *ANSWERS[Option.INFO]]


def test_too_many_options() -> None:
    client = haggler()
    for _ in range(OPTIONS_MAX):
        assert client.kinds(99) == UNSUP
    with pytest.raises(ProtocolError):
        client.ask(Option.LIST)


@pytest.mark.parametrize("name", [b"", b"nothing", "fran\u00e7ais".encode()])
def test_unknown_exports(name: bytes) -> None:
    client = Haggler(Handshake(exports("a", "b")))
    client.ask(Option.STRUCTURED_REPLY)
    for number in (Option.INFO, Option.GO):
        assert client.kinds(number, info_data(name)) == UNKNOWN
    for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert client.kinds(number, context_data(name)) == UNKNOWN
    with pytest.raises(ProtocolError):
        client.ask(Option.EXPORT_NAME, name)


def test_empty_name() -> None:
    only = Haggler(Handshake(exports("only")))
    only.ask(Option.GO, info_data(b""))
    assert only.entering == "only"
    chosen = Haggler(Handshake(exports("a", "b", default="b")))
    chosen.ask(Option.EXPORT_NAME, b"")
    assert chosen.entering == "b"
    gone = Haggler(Handshake(exports("a", default="c")))
    assert gone.kinds(Option.GO, info_data(b"")) == UNKNOWN


def test_list_names_every_export_with_its_description() -> None:
    client = Haggler(Handshake(exports("b", "a")))
    found = client.ask(Option.LIST)
    expected = [struct.pack(">I", 1) + name + b"in memory" for name in (b"a", b"b")]
    assert [data for _, _, data in found] == [*expected, b""]


def test_contexts() -> None:
    client = haggler()
    client.ask(Option.STRUCTURED_REPLY)
    found = client.ask(Option.LIST_META_CONTEXT, context_data(b""))
    every = [bytes(4) + b"base:allocation", bytes(4) + b"qemu:allocation-depth", b""]
    assert [data for _, _, data in found] == every
    for queries in ((b"base:",), (b"base:allocation", b"base:"), (b"x-other:", b"base:allocation")):
        found = client.ask(Option.LIST_META_CONTEXT, context_data(b"", *queries))
        assert [data for _, _, data in found] == [bytes(4) + b"base:allocation", b""]
    for queries in ((b"x-other:",), (b"base:unknown",)):
        assert client.kinds(Option.LIST_META_CONTEXT, context_data(b"", *queries)) == ACK
    for queries in ((), (b"base:",), (b"base:unknown", b"qemu:dirty")):
        assert client.kinds(Option.SET_META_CONTEXT, context_data(b"", *queries)) == ACK
    found = client.ask(Option.SET_META_CONTEXT, context_data(b"", b"base:allocation", b"base:allocation"))
    assert [data for _, _, data in found] == [struct.pack(">I", 1) + b"base:allocation", b""]


@pytest.mark.parametrize(
    "second",
    [
        context_data(b"disk"),
        context_data(b"disk", b"base:"),
        context_data(b"nothing", b"base:allocation"),
        b"malformed",
    ],
)
def test_a_later_choice_of_contexts_replaces_the_earlier_one(second: bytes) -> None:
    client = haggler()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, context_data(b"disk", b"base:allocation"))
    client.ask(Option.SET_META_CONTEXT, second)
    client.ask(Option.GO, info_data(b"disk"))
    client.enter()
    assert client.handshake.agreement.contexts == ()


def test_contexts_hold_for_the_export_they_were_chosen_for() -> None:
    client = Haggler(Handshake(exports("a", "b")))
    client.ask(Option.EXTENDED_HEADERS)
    client.ask(Option.SET_META_CONTEXT, context_data(b"a", b"base:allocation"))
    client.ask(Option.GO, info_data(b"b"))
    entered = client.enter()
    assert client.handshake.agreement.contexts == ()
    (size_and_flags,) = [data for _, kind, data in replies(entered) if data[:2] == b"\0\0" and len(data) == 12]
    assert not struct.unpack(">HQH", size_and_flags)[2] & TransmissionFlag.BLOCK_STATUS_PAYLOAD


def test_extended_headers_take_precedence() -> None:
    client = haggler()
    assert client.kinds(Option.STRUCTURED_REPLY) == ACK
    assert client.kinds(Option.EXTENDED_HEADERS) == ACK
    assert client.kinds(Option.STRUCTURED_REPLY) == [OptionReply.ERR_EXT_HEADER_REQD]
    assert client.kinds(Option.EXTENDED_HEADERS) == ACK
    with pytest.raises(ProtocolError):
        client.ask(Option.EXPORT_NAME, b"disk")


def test_extended_headers_can_be_switched_off() -> None:
    client = haggler(extended=False)
    assert client.kinds(Option.EXTENDED_HEADERS) == UNSUP
    assert client.kinds(Option.STRUCTURED_REPLY) == ACK


def test_an_export_that_can_not_be_opened() -> None:
    client = haggler()
    client.ask(Option.GO, info_data(b"disk"))
    client.handshake.refused(OptionReply.ERR_POLICY, "busy")
    assert replies(client.handshake.take_output()) == [(Option.GO, OptionReply.ERR_POLICY, b"busy")]
    client.ask(Option.EXPORT_NAME, b"disk")
    client.handshake.refused(OptionReply.ERR_POLICY, "busy")
    assert client.handshake.take_output() == b""
    assert client.handshake.state is State.CLOSED


def test_stopping() -> None:
    client = haggler()
    client.handshake.stopping = True
    assert client.kinds(Option.LIST) == [OptionReply.ERR_SHUTDOWN]
    assert client.kinds(Option.GO, info_data(b"disk")) == [OptionReply.ERR_SHUTDOWN]
    assert client.kinds(Option.ABORT) == ACK
    closing = haggler()
    closing.handshake.stopping = True
    with pytest.raises(ProtocolError):
        closing.ask(Option.EXPORT_NAME, b"disk")


def test_texts_are_cut_at_a_character() -> None:
    assert wire.text_bytes("a\0b") == "a\ufffdb".encode()
    assert wire.text_bytes("\u20ac" * 5, 7) == "\u20ac\u20ac".encode()
    assert len(wire.text_bytes("x" * 9999)) == 4096
    (_, _, text) = replies(wire.reply_error(99, OptionReply.ERR_UNSUP, "\u20ac" * 3000))[0]
    assert len(text) <= 4096
    assert text.decode()


def test_a_long_name_in_an_error_text() -> None:
    client = haggler()
    name = ("\u20ac" * 1365).encode()
    ((_, kind, text),) = client.ask(Option.INFO, info_data(name))
    assert kind == OptionReply.ERR_UNKNOWN
    assert len(text) <= 4096


def test_the_description_ends_with_what_tells_one_disk_from_another() -> None:
    plain = VolumeInfo("disk", 4096, False, "writeback, 1 copy")
    assert description(plain) == "writeback, 1 copy"
    assert description(plain._replace(identity="0a:1:2:0")) == "writeback, 1 copy, identity 0a:1:2:0"
