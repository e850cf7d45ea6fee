"""Handshake phase of one connection, without I/O: a table of states and options.

The connection feeds bytes with `receive`, calls `step` until it returns None, and sends `take_output()` before it
receives more. `step` returns `Enter` when the client has chosen an export: the connection opens it and calls `entered`
or `refused`. It returns `Secure` when TLS begins: the connection sends the output, sets TLS up and calls `secured`.
A pair of state and option that is not in TABLE: in a state that knows options at all ERR_UNSUP, otherwise the option
breaks the protocol and ends the connection.
Limits: OPTION_BYTES_MAX of one option (longer ones are skipped as they arrive), options_max options.
Spec: proto.md, "Newstyle negotiation", "Fixed newstyle negotiation", "Option types", "Option reply types", "TLS
support"; proto-ext-header.md for EXTENDED_HEADERS.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final, NamedTuple

from nbdserver.exports import (
    BLOCK_SIZES_BYTES,
    SNAPSHOT_CONTEXTS_MAX,
    View,
    context_ids,
    matching_contexts,
    snapshot_of,
    transmission_flags,
)
from nbdserver.wire import options as wire
from nbdserver.wire.constants import (
    OPTION_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    ProtocolError,
)
from objstore.units import KIB
from objstore.volume.base import VolumeInfo

OPTION_BYTES_MAX: Final = 64 * KIB
"""Data of one option: a name and thousands of information requests or queries."""
OPTIONS_MAX: Final = 64
"""Options of one connection; clients need fewer than ten (nbdkit ends the connection after 32)."""

IDENTITY_WORD: Final = "identity"
"""In front of what tells one disk from another in an export's description."""

HANDSHAKE_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
CLIENT_FLAGS_KNOWN: Final = ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES


class TlsMode(Enum):
    """What the server makes of STARTTLS: the three modes of proto.md, "Server-side requirements"."""

    OFF = "off"
    SELECTIVE = "selective"
    FORCED = "forced"


class State(Enum):
    """Where the handshake stands."""

    GREETING = "waits for the client's flags"
    NEWSTYLE = "client without fixed newstyle: may name an export, nothing else"
    OPTIONS = "haggles over options"
    SECURING = "TLS begins"
    OPENING = "an export is being opened"
    TRANSMISSION = "agreed"
    CLOSED = "the connection ends once the output is sent"


class Agreement(NamedTuple):
    """What transmission is like for this connection. contexts: (id, name) of the selected metadata contexts."""

    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]


class Enter(NamedTuple):
    """The client wants this export (its real name) for transmission."""

    name: str


class Secure:
    """The client has been promised TLS: `secured` must follow."""


class Handshake:
    """One handshake. view: the exports that there are for this client. extended: offer extended headers. tls: the mode,
    for the whole connection."""

    def __init__(
        self,
        view: View,
        *,
        extended: bool = True,
        options_max: int = OPTIONS_MAX,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self.state = State.GREETING
        self.secure = False
        """TLS is in use."""
        self.stopping = False
        """The server is closing: every option but ABORT gets ERR_SHUTDOWN."""
        self._view = view
        self._tls = tls
        self._extended_offered = extended
        self._options_left = options_max
        self._input = bytearray()
        self._skip_bytes = 0
        self._output = bytearray(wire.greeting(HANDSHAKE_FLAGS))
        self._no_zeroes = False
        self._structured = False
        self._extended = False
        self._contexts_of: str | None = None
        self._contexts: tuple[str, ...] = ()
        self._option = 0
        self._wanted: tuple[int, ...] = ()

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes from the client; what belongs to an option that is skipped is dropped at once."""
        dropped = min(len(data), self._skip_bytes)
        self._skip_bytes -= dropped
        self._input += data[dropped:]

    def take_output(self) -> bytes:
        """What to send now."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def take_rest(self) -> bytes:
        """Bytes behind the last option; they belong to transmission."""
        rest = bytes(self._input)
        self._input.clear()
        return rest

    @property
    def agreement(self) -> Agreement:
        contexts = tuple(zip(context_ids(self._contexts), self._contexts, strict=True))
        return Agreement(self._structured and not self._extended, self._extended, contexts)

    def step(self) -> Enter | Secure | bool:
        """Do one thing with the bytes that are there. False: nothing to do until more come (or `entered`, `refused`,
        `secured`).

        ProtocolError: end the connection. One option a step, so that output never piles up unsent.
        """
        if self.state is State.GREETING:
            return self._client_flags()
        if self.state not in (State.NEWSTYLE, State.OPTIONS) or len(self._input) < wire.OPTION_HEADER.size:
            return False
        magic, option, length = wire.OPTION_HEADER.unpack_from(self._input)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"option magic is {magic:#x}, not {OPTION_MAGIC:#x}")
        end = wire.OPTION_HEADER.size + length
        if length > OPTION_BYTES_MAX:
            arrived = min(end, len(self._input))
            self._skip_bytes = end - arrived
            del self._input[:arrived]
            return self._perform(option, None)
        if len(self._input) < end:
            return False
        data = bytes(self._input[wire.OPTION_HEADER.size : end])
        del self._input[:end]
        return self._perform(option, data)

    def contexts_of(self, name: str) -> tuple[str, ...]:
        """The contexts that are selected, if they are for this export."""
        return self._contexts if self._contexts_of == name else ()

    def secured(self, view: View) -> None:
        """TLS is in use, and the client may have a name now that makes it see other exports. What was agreed before is
        forgotten: somebody else may have said it."""
        assert self.state is State.SECURING
        assert not self._input
        self._view = view
        self._structured = self._extended = False
        self._contexts_of, self._contexts = None, ()
        self._wanted = ()
        self.secure = True
        self.state = State.OPTIONS

    def entered(self, info: VolumeInfo) -> None:
        """The export is open: tell the client, and transmission begins."""
        assert self.state is State.OPENING
        if self._option == Option.EXPORT_NAME:
            flags = self._flags(info, "")
            self._output += wire.export_name_reply(info.size_bytes, flags, zeroes=not self._no_zeroes)
        else:
            self._describe(info)
            self._reply(OptionReply.ACK)
        if self._contexts_of != info.name:
            self._contexts = ()
        self.state = State.TRANSMISSION

    def refused(self, kind: OptionReply, text: str) -> None:
        """The export could not be opened. EXPORT_NAME has no way to say so: the connection ends."""
        assert self.state is State.OPENING
        if self._option == Option.EXPORT_NAME:
            self.state = State.CLOSED
            return
        self._error(kind, text)
        self.state = State.OPTIONS

    def _client_flags(self) -> bool:
        if len(self._input) < wire.CLIENT_FLAGS.size:
            return False
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._input)
        del self._input[: wire.CLIENT_FLAGS.size]
        if flags & ~int(CLIENT_FLAGS_KNOWN):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & ClientFlag.C_NO_ZEROES)
        self.state = State.OPTIONS if flags & ClientFlag.C_FIXED_NEWSTYLE else State.NEWSTYLE
        return True

    def _perform(self, option: int, data: bytes | None) -> Enter | Secure | bool:
        """Answer one option. data None: it was too long to keep."""
        self._options_left -= 1
        if self._options_left < 0:
            raise ProtocolError("too many options without choosing an export")
        self._option = option
        handler = TABLE.get((self.state, option))
        if self._tls is TlsMode.FORCED and not self.secure and option not in (Option.STARTTLS, Option.ABORT):
            if option == Option.EXPORT_NAME or self.state is not State.OPTIONS:
                raise ProtocolError(f"option {option} without TLS, which is required")
            self._error(OptionReply.ERR_TLS_REQD, "this server requires TLS")
        elif handler is None:
            if self.state is not State.OPTIONS:
                raise ProtocolError(f"option {option} is not possible now: {self.state.value}")
            self._error(OptionReply.ERR_UNSUP, f"unknown option {option}")
        elif self.stopping and option != Option.ABORT:
            if option == Option.EXPORT_NAME:
                raise ProtocolError("the server is closing")
            self._error(OptionReply.ERR_SHUTDOWN, "the server is closing")
        elif data is None and option not in (Option.ABORT, Option.STARTTLS):
            if option == Option.EXPORT_NAME:
                raise ProtocolError("export name is too long")
            self._error(OptionReply.ERR_TOO_BIG, f"data of an option is at most {OPTION_BYTES_MAX} bytes")
        else:
            event = handler(self, b"too long" if data is None else data)
            return True if event is None else event
        return True

    def _export_name(self, data: bytes) -> Enter | None:
        if self._extended:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            name = wire.decode_string(data)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        info = self._view.describe(name)
        if info is None:
            raise ProtocolError(f"no such export {name!r}")
        if info.refused:
            raise ProtocolError(info.refused)
        self.state = State.OPENING
        return Enter(info.name)

    def _abort(self, data: bytes) -> None:
        self._reply(OptionReply.ACK)
        self.state = State.CLOSED

    def _list(self, data: bytes) -> None:
        if self._without_data(data):
            for name in self._view.names():
                info = self._view.describe(name)
                if info is not None:
                    self._output += wire.reply_server(self._option, name, info.description)
            self._reply(OptionReply.ACK)

    def _starttls(self, data: bytes) -> Secure | None:
        if not self._without_data(data):
            return None
        if self._tls is TlsMode.OFF:
            self._error(OptionReply.ERR_UNSUP, "this server has no TLS")
            return None
        if self.secure:
            self._error(OptionReply.ERR_INVALID, "TLS is in use already")
            return None
        if self._input:
            raise ProtocolError("plain bytes behind STARTTLS, which the client can't have meant")
        self._reply(OptionReply.ACK)
        self.state = State.SECURING
        return Secure()

    def _info(self, data: bytes) -> None:
        info = self._requested(data)
        if info is not None:
            self._describe(info)
            self._reply(OptionReply.ACK)

    def _go(self, data: bytes) -> Enter | None:
        info = self._requested(data)
        if info is None:
            return None
        self.state = State.OPENING
        return Enter(info.name)

    def _structured_reply(self, data: bytes) -> None:
        if not self._without_data(data):
            return
        if self._extended:
            self._error(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use already")
            return
        self._structured = True
        self._reply(OptionReply.ACK)

    def _extended_headers(self, data: bytes) -> None:
        if not self._extended_offered:
            self._error(OptionReply.ERR_UNSUP, "extended headers are switched off")
        elif self._without_data(data):
            self._extended = True
            self._reply(OptionReply.ACK)

    def _list_meta_context(self, data: bytes) -> None:
        request = self._context_request(data)
        if request is None:
            return
        for name in self._matches(request, listing=True):
            self._output += wire.reply_context(self._option, 0, name)
        self._reply(OptionReply.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        self._contexts_of, self._contexts = None, ()
        request = self._context_request(data)
        if request is None:
            return
        info = self._view.describe(request.name)
        assert info is not None
        wanted = self._matches(request, listing=False)
        if sum(snapshot_of(name) is not None for name in wanted) > SNAPSHOT_CONTEXTS_MAX:
            text = f"a connection compares with at most {SNAPSHOT_CONTEXTS_MAX} snapshots"
            self._error(OptionReply.ERR_TOO_BIG, text)
            return
        self._contexts_of, self._contexts = info.name, wanted
        for number, name in zip(context_ids(wanted), wanted, strict=True):
            self._output += wire.reply_context(self._option, number, name)
        self._reply(OptionReply.ACK)

    def _matches(self, request: wire.ContextRequest, *, listing: bool) -> tuple[str, ...]:
        """Contexts that the queries name, each once; all of them for a list without queries."""
        info = self._view.describe(request.name)
        assert info is not None
        names = self._view.contexts(info.name)
        if listing and not request.queries:
            return tuple(names)
        found = (name for query in request.queries for name in matching_contexts(query, names, listing=listing))
        return tuple(dict.fromkeys(found))

    def _context_request(self, data: bytes) -> wire.ContextRequest | None:
        """The request for contexts of an export that exists; None: an error was sent."""
        if not (self._structured or self._extended):
            self._error(OptionReply.ERR_INVALID, "metadata contexts need structured replies or extended headers")
            return None
        try:
            request = wire.decode_context_request(data)
        except ValueError as error:
            self._error(OptionReply.ERR_INVALID, str(error))
            return None
        info = self._view.describe(request.name)
        if info is None:
            self._error(OptionReply.ERR_UNKNOWN, f"no such export {request.name!r}")
            return None
        if info.refused:
            self._error(OptionReply.ERR_POLICY, info.refused)
            return None
        return request

    def _requested(self, data: bytes) -> VolumeInfo | None:
        """The export that INFO or GO ask for; None: an error was sent."""
        try:
            request = wire.decode_info_request(data)
        except ValueError as error:
            self._error(OptionReply.ERR_INVALID, str(error))
            return None
        self._wanted = request.wanted
        info = self._view.describe(request.name)
        if info is None:
            self._error(*self._no_such_export(request.name))
        elif info.refused:
            self._error(OptionReply.ERR_POLICY, info.refused)
            return None
        return info

    def _no_such_export(self, name: str) -> tuple[OptionReply, str]:
        """What INFO and GO say. Without TLS nobody is told whether TLS would make a difference."""
        text = f"no such export {name!r}" if name else "there is no default export"
        if self._tls is TlsMode.SELECTIVE and not self.secure:
            return OptionReply.ERR_TLS_REQD, f"{text}, or it requires TLS"
        return OptionReply.ERR_UNKNOWN, text

    def _describe(self, info: VolumeInfo) -> None:
        """The information replies to INFO and GO. Sizes are told always: clients that do not ask use them all the
        same, and guess worse ones otherwise."""
        items = [
            wire.info_export(info.size_bytes, self._flags(info, info.name)),
            wire.info_block_size(BLOCK_SIZES_BYTES),
        ]
        if Info.NAME in self._wanted:
            items.append(wire.info_text(Info.NAME, info.name))
        if Info.DESCRIPTION in self._wanted:
            items.append(wire.info_text(Info.DESCRIPTION, description(info)))
        for item in items:
            self._reply(OptionReply.INFO, item)

    def _flags(self, info: VolumeInfo, name: str) -> int:
        return transmission_flags(
            read_only=info.read_only,
            chunked=self._structured or self._extended,
            status_payload=self._extended and bool(self._contexts) and self._contexts_of == name,
        )

    def _without_data(self, data: bytes) -> bool:
        """True if the option has no data, as it must; otherwise an error was sent."""
        if data:
            self._error(OptionReply.ERR_INVALID, f"this option has no data, {len(data)} bytes came")
        return not data

    def _reply(self, kind: OptionReply, data: bytes = b"") -> None:
        self._output += wire.reply(self._option, kind, data)

    def _error(self, kind: OptionReply, text: str) -> None:
        self._output += wire.reply_error(self._option, kind, text)


def description(info: VolumeInfo) -> str:
    """A line for people and, at its end, for programs: which disk this is (PROTOCOL.md, "Which disk it is")."""
    return f"{info.description}, {IDENTITY_WORD} {info.identity}" if info.identity else info.description


Handler = Callable[[Handshake, bytes], Enter | Secure | None]

TABLE: Final[Mapping[tuple[State, int], Handler]] = {
    (State.NEWSTYLE, Option.EXPORT_NAME): Handshake._export_name,
    (State.OPTIONS, Option.EXPORT_NAME): Handshake._export_name,
    (State.OPTIONS, Option.ABORT): Handshake._abort,
    (State.OPTIONS, Option.LIST): Handshake._list,
    (State.OPTIONS, Option.STARTTLS): Handshake._starttls,
    (State.OPTIONS, Option.INFO): Handshake._info,
    (State.OPTIONS, Option.GO): Handshake._go,
    (State.OPTIONS, Option.STRUCTURED_REPLY): Handshake._structured_reply,
    (State.OPTIONS, Option.LIST_META_CONTEXT): Handshake._list_meta_context,
    (State.OPTIONS, Option.SET_META_CONTEXT): Handshake._set_meta_context,
    (State.OPTIONS, Option.EXTENDED_HEADERS): Handshake._extended_headers,
}
