"""A raw NBD client for tests: every message can be sent well-formed or malformed, every reply is checked by the text.

It never answers on its own, and knows nothing of the server's code. What a reply must look like stands in nbd_spec.py,
the socket in channel.py. Works with any NBD server.
"""

import itertools
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from tests.support.channel import Channel, Payload
from tests.support.nbd_spec import (
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION_HEADER,
    OPTION_REPLY_HEADER,
    OPTION_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    ExportFlag,
    ExportInfo,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    Rep,
    Reply,
    Request,
    check_export_flags,
    rule,
)

FIRST_PART_BYTES = 1 << 16
"""How much of a payload goes out together with its header."""
CLIENT_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


def export_request(name: str | bytes, infos: Sequence[int] = (), *, name_length: int | None = None) -> bytes:
    """Data of NBD_OPT_INFO and NBD_OPT_GO; name_length lies about the name if given."""
    raw = name.encode() if isinstance(name, str) else name
    head = struct.pack(">I", len(raw) if name_length is None else name_length) + raw
    return head + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_request(
    name: str | bytes,
    queries: Sequence[str | bytes],
    *,
    name_length: int | None = None,
    query_count: int | None = None,
    query_length: int | None = None,
) -> bytes:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT; the keywords replace true lengths by lies."""
    raw = name.encode() if isinstance(name, str) else name
    parts = [struct.pack(">I", len(raw) if name_length is None else name_length), raw]
    parts.append(struct.pack(">I", len(queries) if query_count is None else query_count))
    for query in queries:
        text = query.encode() if isinstance(query, str) else query
        parts.append(struct.pack(">I", len(text) if query_length is None else query_length) + text)
    return b"".join(parts)


class NbdClient(Channel):
    """One connection. Use `connected` or `attached` to open one that is closed at the end of a block."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.handshake_flags = HandshakeFlag(0)
        self.client_flags = HandshakeFlag(0)
        self.structured = False
        self.extended = False
        self.size_bytes = 0
        self.flags = ExportFlag(0)
        self.contexts: dict[int, str] = {}
        self._cookies = itertools.count(0x1000)
        self._pending: dict[int, list[Reply]] = {}
        self._complete: list[Reply] = []

    # Handshake

    async def greeting(self) -> HandshakeFlag:
        """Section "Newstyle negotiation": the server's first 18 bytes."""
        magic, option_magic, flags = GREETING.unpack(await self.receive(GREETING.size, "the greeting"))
        rule(magic == NBDMAGIC, "greeting without NBDMAGIC")
        rule(option_magic == IHAVEOPT, "greeting without IHAVEOPT")
        rule(flags & ~3 == 0, f"undefined handshake flags {flags:#x}")
        self.handshake_flags = HandshakeFlag(flags)
        return self.handshake_flags

    async def send_client_flags(self, flags: int = CLIENT_FLAGS) -> None:
        self.client_flags = HandshakeFlag(flags & 3)
        await self.send(struct.pack(">I", flags))

    async def greet(self, flags: int = CLIENT_FLAGS) -> None:
        await self.greeting()
        await self.send_client_flags(flags)

    async def send_option(
        self, option: int, data: Payload = b"", *, length: int | None = None, magic: int = IHAVEOPT
    ) -> None:
        """length: the header's length field, if it is to differ from the data that follows."""
        await self.send(OPTION_HEADER.pack(magic, option, len(data) if length is None else length) + bytes(data))

    async def option_reply(self, option: int) -> OptionReply:
        """The next reply, which must belong to `option`."""
        header = await self.receive(OPTION_REPLY_HEADER.size, f"a reply to option {option}")
        magic, echoed, kind, length = OPTION_REPLY_HEADER.unpack(header)
        rule(magic == OPTION_REPLY_MAGIC, f"option reply magic {magic:#x}")
        rule(echoed == option, f"reply names option {echoed}, sent was {option}")
        try:
            kind = Rep(kind)
        except ValueError:
            raise AssertionError(f"unknown option reply type {kind:#x}") from None
        rule(length <= 1 << 16, f"option reply announces {length} bytes")
        reply = OptionReply(option, kind, await self.receive(length, f"data of {kind.name}"))
        reply.check()
        return reply

    async def option_replies(self, option: int) -> list[OptionReply]:
        """All replies to one option, the final one last."""
        replies = [await self.option_reply(option)]
        while not replies[-1].is_final:
            replies.append(await self.option_reply(option))
        return replies

    async def option(self, option: int, data: Payload = b"", *, length: int | None = None) -> list[OptionReply]:
        await self.send_option(option, data, length=length)
        return await self.option_replies(option)

    async def final(self, option: int, data: Payload = b"") -> Rep:
        """Type of the final reply to an option."""
        return (await self.option(option, data))[-1].type

    async def in_step(self) -> None:
        """The option stream is where it should be: an unknown option gets its NBD_REP_ERR_UNSUP and nothing else."""
        replies = await self.option(0x7FFFFFF1, b"skip me")
        assert [reply.type for reply in replies] == [Rep.ERR_UNSUP]

    async def secure(self, context: ssl.SSLContext) -> None:
        """NBD_OPT_STARTTLS and what it promises."""
        assert await self.final(Option.STARTTLS) == Rep.ACK
        self.structured = self.extended = False
        self.contexts = {}
        await self.start_tls(context)

    async def structured_replies(self) -> None:
        assert await self.final(Option.STRUCTURED_REPLY) == Rep.ACK
        self.structured = True

    async def extended_headers(self) -> None:
        assert await self.final(Option.EXTENDED_HEADERS) == Rep.ACK
        self.extended = True

    async def exports(self) -> list[tuple[str, str]]:
        replies = await self.option(Option.LIST)
        assert replies[-1].type == Rep.ACK
        return [reply.server() for reply in replies[:-1]]

    async def info(self, name: str | bytes = "", infos: Sequence[int] = ()) -> ExportInfo:
        return ExportInfo.parse(await self.option(Option.INFO, export_request(name, infos)))

    async def go(self, name: str | bytes = "", infos: Sequence[int] = (Info.BLOCK_SIZE,)) -> ExportInfo:
        """NBD_OPT_GO; after NBD_REP_ACK this client is in the transmission phase."""
        info = ExportInfo.parse(await self.option(Option.GO, export_request(name, infos)))
        if info.accepted:
            assert info.size_bytes is not None
            self.size_bytes, self.flags = info.size_bytes, info.flags
        return info

    async def export_name(self, name: str | bytes = "") -> None:
        """NBD_OPT_EXPORT_NAME, and the server's answer with or without its 124 zeroes."""
        await self.send_option(Option.EXPORT_NAME, name.encode() if isinstance(name, str) else name)
        self.size_bytes, flags = struct.unpack(">QH", await self.receive(10, "size and flags of the export"))
        self.flags = check_export_flags(flags)
        if not (self.handshake_flags & self.client_flags & HandshakeFlag.NO_ZEROES):
            rule(await self.receive(124, "zeroes") == bytes(124), "the 124 reserved bytes MUST be zeroes")

    async def set_contexts(self, name: str | bytes, queries: Sequence[str | bytes]) -> Rep:
        replies = await self.option(Option.SET_META_CONTEXT, context_request(name, queries))
        self.contexts = dict(reply.context() for reply in replies[:-1]) if replies[-1].type == Rep.ACK else {}
        rule(
            len(self.contexts) == len(replies) - 1 or replies[-1].type != Rep.ACK, "metadata context ids MUST be unique"
        )
        return replies[-1].type

    async def list_contexts(self, name: str | bytes, queries: Sequence[str | bytes]) -> list[str]:
        replies = await self.option(Option.LIST_META_CONTEXT, context_request(name, queries))
        assert replies[-1].type == Rep.ACK
        found = [reply.context() for reply in replies[:-1]]
        rule(all(number == 0 for number, _ in found), "ids in NBD_OPT_LIST_META_CONTEXT SHOULD be zero")
        return [name for _, name in found]

    # Transmission

    def pack_request(
        self,
        command: int,
        offset_bytes: int = 0,
        length_bytes: int = 0,
        *,
        flags: int = 0,
        cookie: int = 0,
        magic: int | None = None,
    ) -> bytes:
        """A request header in the form that was negotiated; `flags` go out as they are."""
        if self.extended:
            magic = EXTENDED_REQUEST_MAGIC if magic is None else magic
            return EXTENDED_REQUEST.pack(magic, flags, command, cookie, offset_bytes, length_bytes)
        magic = REQUEST_MAGIC if magic is None else magic
        return REQUEST.pack(magic, flags, command, cookie, offset_bytes, length_bytes)

    def expect(self, request: Request, contexts: Iterable[int] | None = None) -> Reply:
        """Note that a reply to this request must come. contexts: the ids that a BLOCK_STATUS payload limits it to."""
        ids = frozenset(self.contexts if contexts is None else contexts)
        reply = Reply(request, ids, self.size_bytes)
        self._pending.setdefault(request.cookie, []).append(reply)
        return reply

    async def submit(
        self,
        command: int,
        offset_bytes: int = 0,
        length_bytes: int = 0,
        *,
        payload: Payload | None = None,
        flags: int = 0,
        cookie: int | None = None,
        contexts: Iterable[int] | None = None,
    ) -> Reply:
        """Send one request, with its payload if it has one, and return the reply that will be filled in.

        With extended headers NBD_CMD_FLAG_PAYLOAD_LEN is set when there is a payload, whose length then goes out.
        """
        if cookie is None:
            cookie = next(self._cookies)
        announced = length_bytes if payload is None else len(payload)
        if payload is not None and self.extended:
            flags |= CommandFlag.PAYLOAD_LEN
        reply = self.expect(Request(command, flags, cookie, offset_bytes, length_bytes or announced), contexts)
        header = self.pack_request(command, offset_bytes, announced, flags=flags, cookie=cookie)
        if payload is None:
            await self.send(header)
        else:
            view = memoryview(payload)
            await self.send(header + bytes(view[:FIRST_PART_BYTES]))
            if len(view) > FIRST_PART_BYTES:
                await self.send(view[FIRST_PART_BYTES:])
        return reply

    async def next_reply(self) -> Reply:
        """The next reply that is complete, in the order in which the server finishes them."""
        while not self._complete:
            await self._receive_message()
        return self._complete.pop(0)

    async def wait(self, reply: Reply) -> Reply:
        """Receive until this reply is complete; others that complete meanwhile stay for next_reply."""
        while reply not in self._complete:
            await self._receive_message()
        self._complete.remove(reply)
        return reply

    async def wait_all(self, replies: Iterable[Reply]) -> list[Reply]:
        return [await self.wait(reply) for reply in replies]

    async def call(
        self,
        command: int,
        offset_bytes: int = 0,
        length_bytes: int = 0,
        *,
        payload: Payload | None = None,
        flags: int = 0,
        cookie: int | None = None,
        contexts: Iterable[int] | None = None,
    ) -> Reply:
        return await self.wait(
            await self.submit(
                command, offset_bytes, length_bytes, payload=payload, flags=flags, cookie=cookie, contexts=contexts
            )
        )

    def outstanding(self) -> int:
        """Requests without a complete reply."""
        return sum(len(replies) for replies in self._pending.values())

    async def skip_replies(self, count: int) -> list[int]:
        """Receive chunked replies up to `count` final chunks, and forget every pending request; the cookies in order.

        For requests that share a cookie: which of them a chunk belongs to can't be told.
        """
        cookies: list[int] = []
        while len(cookies) < count:
            if self.extended:
                header = await self.receive(EXTENDED_REPLY.size, "an extended reply")
                _, flags, _, cookie, _, length = EXTENDED_REPLY.unpack(header)
            else:
                header = await self.receive(STRUCTURED_REPLY.size, "a structured reply")
                _, flags, _, cookie, length = STRUCTURED_REPLY.unpack(header)
            await self.receive(length, "payload of a chunk")
            if flags & REPLY_FLAG_DONE:
                cookies.append(cookie)
        self._pending.clear()
        return cookies

    async def _receive_message(self) -> None:
        if self.extended:
            header = await self.receive(EXTENDED_REPLY.size, "an extended reply")
            magic, flags, kind, cookie, offset_bytes, length = EXTENDED_REPLY.unpack(header)
            rule(magic == EXTENDED_REPLY_MAGIC, f"reply magic {magic:#x} although extended headers were negotiated")
            reply = self._pending_reply(cookie)
            rule(offset_bytes == reply.request.offset_bytes, "the offset of an extended reply MUST match the request")
            await self._receive_chunk(reply, flags, kind, length)
            return
        (magic,) = struct.unpack(">I", await self.receive(4, "a reply"))
        if magic == STRUCTURED_REPLY_MAGIC:
            rule(self.structured, "structured reply without negotiation")
            rest = await self.receive(STRUCTURED_REPLY.size - 4, "a structured reply")
            flags, kind, cookie, length = struct.unpack(">HHQI", rest)
            await self._receive_chunk(self._pending_reply(cookie), flags, kind, length)
            return
        rule(magic == SIMPLE_REPLY_MAGIC, f"reply magic {magic:#x}")
        error, cookie = struct.unpack(">IQ", await self.receive(SIMPLE_REPLY.size - 4, "a simple reply"))
        reply = self._pending_reply(cookie)
        is_read = reply.request.command == Command.READ
        rule(not (self.structured and is_read), "simple reply to a read although structured replies were negotiated")
        rule(not (self.structured and error == 0 and reply.request.command == Command.BLOCK_STATUS), "status as simple")
        data = b""
        if is_read and not error:
            data = await self.receive(reply.request.length_bytes, "payload of a read")
        reply.take_simple(error, data)
        self._finish(reply)

    async def _receive_chunk(self, reply: Reply, flags: int, kind: int, length: int) -> None:
        rule(length <= reply.request.length_bytes + (1 << 24), f"chunk announces {length} bytes")
        chunk = Chunk(flags, kind, await self.receive(length, f"payload of chunk type {kind}"))
        reply.take(chunk, extended=self.extended)
        if chunk.done:
            self._finish(reply)

    def _pending_reply(self, cookie: int) -> Reply:
        rule(bool(self._pending.get(cookie)), f"reply with cookie {cookie:#x}, which no pending request has")
        return self._pending[cookie][0]

    def _finish(self, reply: Reply) -> None:
        cookie = reply.request.cookie
        self._pending[cookie].remove(reply)
        if not self._pending[cookie]:
            del self._pending[cookie]
        self._complete.append(reply)

    async def read(self, offset_bytes: int, length_bytes: int, *, flags: int = 0) -> bytes:
        """The data; an error reply fails the test."""
        reply = await self.call(Command.READ, offset_bytes, length_bytes, flags=flags)
        assert not reply.errors, f"read {offset_bytes}+{length_bytes}: {reply.errors}"
        return bytes(reply.data)

    async def write(self, offset_bytes: int, data: Payload, *, flags: int = 0) -> None:
        reply = await self.call(Command.WRITE, offset_bytes, payload=data, flags=flags)
        assert not reply.errors, f"write {offset_bytes}+{len(data)}: {reply.errors}"

    async def flush(self) -> None:
        reply = await self.call(Command.FLUSH)
        assert not reply.errors, f"flush: {reply.errors}"

    async def status(self, offset_bytes: int, length_bytes: int, *, flags: int = 0) -> list[tuple[int, int]]:
        """Extents of the only selected context as (length, flags)."""
        reply = await self.call(Command.BLOCK_STATUS, offset_bytes, length_bytes, flags=flags)
        assert not reply.errors, f"block status {offset_bytes}+{length_bytes}: {reply.errors}"
        (extents,) = reply.extents.values()
        return extents

    async def send_disc(self) -> None:
        await self.send(self.pack_request(Command.DISC))

    async def still_serves(self) -> None:
        """The connection is in step: a read of the first bytes is answered."""
        assert self.outstanding() == 0
        length = min(512, self.size_bytes)
        assert len(await self.read(0, length)) == length


@asynccontextmanager
async def connected(
    address: str,
    *,
    flags: int | None = CLIENT_FLAGS,
    receive_buffer_bytes: int | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[NbdClient]:
    """A connection with the greeting behind it (flags None: nothing read or sent yet), and TLS if it shall have it."""
    client = await NbdClient.connect(address, receive_buffer_bytes=receive_buffer_bytes)
    try:
        if flags is not None:
            await client.greet(flags)
            if tls is not None:
                await client.secure(tls)
        yield client
    finally:
        client.close()


@asynccontextmanager
async def attached(
    address: str,
    name: str = "",
    *,
    structured: bool = True,
    extended: bool = False,
    contexts: Sequence[str] = (),
    receive_buffer_bytes: int | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[NbdClient]:
    """A connection in the transmission phase."""
    async with connected(address, receive_buffer_bytes=receive_buffer_bytes, tls=tls) as client:
        if extended:
            await client.extended_headers()
        elif structured:
            await client.structured_replies()
        if contexts:
            assert await client.set_contexts(name, contexts) == Rep.ACK
        info = await client.go(name)
        assert info.accepted, f"GO refused: {info.final.name} {info.message}"
        yield client


async def whole_map(client: NbdClient, offset_bytes: int, end_bytes: int, *, flags: int = 0) -> list[tuple[int, int]]:
    """All extents of a range, asked for again from where each reply ended, neighbours of one status merged."""
    merged: list[tuple[int, int]] = []
    while offset_bytes < end_bytes:
        for length, status in await client.status(offset_bytes, end_bytes - offset_bytes, flags=flags):
            length = min(length, end_bytes - offset_bytes)
            if merged and merged[-1][1] == status:
                merged[-1] = (merged[-1][0] + length, status)
            else:
                merged.append((length, status))
            offset_bytes += length
    return merged
