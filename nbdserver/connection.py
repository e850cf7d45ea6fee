"""One client: joins a plain non-blocking socket to the handshake, the transmission and the dispatch of its requests.

The handshake is a coroutine. In transmission the socket is watched by reader and writer callbacks without a transport:
a wake-up receives what is there, answers it as a batch and sends with one system call, in the same turn of the loop
(in a prototype, 4 KiB reads at depth 1: 60 k/s so, 22 k/s through a transport).

Flow: requests are taken while fewer than requests_in_flight_max of them wait for the volume, their data and the replies
that the client has not taken stay below their bounds, and memory for a long payload is there; otherwise the socket is
not read, which is how the client notices.
Ends: DISC, end of file, a protocol error and `finish` stop reading; what was taken is answered and sent, the sending
side is shut down (TLS: behind a close_notify), and for at most linger_seconds incoming bytes are read and dropped,
because closing a socket with unread bytes resets it and may destroy replies on their way. `abort` and send errors close
at once. The volume is given back when the last task of the connection has ended.
Every attribute is changed in the event loop only.
"""

import asyncio
import contextlib
import dataclasses
import logging
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final

from nbdserver.buffers import Buffer
from nbdserver.common import Common
from nbdserver.dispatch import BATCH_READ_BYTES_MAX, BATCH_REQUESTS_MAX, Dispatch
from nbdserver.entrance import Entrance
from nbdserver.exports import query_of
from nbdserver.handshake import Enter, Handshake, Secure, State, TlsMode
from nbdserver.identity import Peer
from nbdserver.meters import Meter
from nbdserver.sending import Sender
from nbdserver.settings import ServerSettings
from nbdserver.slow import SlowWatch
from nbdserver.tls import certificate_names, distinguished_name
from nbdserver.tls_stream import TlsStream
from nbdserver.transmission import Transmission
from nbdserver.turns import Share
from nbdserver.watching import SocketWatch
from nbdserver.wire import replies
from nbdserver.wire.constants import ProtocolError
from objstore.access.api import ClientStatus
from objstore.units import KIB
from objstore.volume.base import REQUEST_BYTES_MAX, Volume, VolumeInfo

log = logging.getLogger(__name__)

HANDSHAKE_RECEIVE_BYTES: Final = 16 * KIB
PEEK_BYTES_MAX: Final = 16 << 20
"""More than a socket's receive buffer holds (net.ipv4.tcp_rmem: 6 MiB)."""
ROUNDS_MAX: Final = 16
"""Receives of one wake-up before the other connections get their turn."""


class Connection:
    """One accepted socket, from greeting to close: `run` is its whole life."""

    def __init__(self, sock: socket.socket, peer: Peer, common: Common) -> None:
        self.peer = peer
        self.number = next(common.numbers)
        self.export: str | None = None
        self._entrance = Entrance(common, self, sock)
        self._view = self._entrance.view(peer, secure=False)
        self._sock = sock
        self._common = common
        self._settings = common.settings
        self._pool = common.pool
        self._loop = asyncio.get_running_loop()
        self._connected_at = time.monotonic()
        self._tls = common.tls
        self._stream: socket.socket | TlsStream = sock
        """What bytes go through: the socket itself, or TLS on it."""
        self._handshake = Handshake(
            self._view,
            extended=self._settings.extended_headers,
            options_max=self._settings.options_max,
            tls=TlsMode.OFF if common.tls is None else common.tls.mode,
        )
        self._transmission: Transmission | None = None
        self._dispatch: Dispatch | None = None
        self._meter: Meter | None = None
        self._slow: SlowWatch | None = None
        self._watch = SocketWatch(sock)
        self._sender = Sender(sock, common.pool, common.reply_area, lost=self._lost, moved=self._moved)
        self._reading = False
        self._share: Share | None = None
        self._payload_since: float | None = None
        self._admitted = False
        """Requests may be taken."""
        self._stopping = False
        self._finishing = False
        self._revoked = False
        self._dead = False
        self._in_order: bool | None = None
        """Whether the stream of a peer that has hung up ends with DISC; None: not known yet."""
        self._took_all = asyncio.Event()
        self._memory_wait: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._received_bytes = 0

    @property
    def stalled_since(self) -> float | None:
        """Monotonic time of the last byte that the client took or sent although we wait for it; None: we do not."""
        waiting_since = self._sender.waiting_since
        return self._payload_since if waiting_since is None else waiting_since

    @property
    def moved_bytes(self) -> int:
        """Received and sent so far."""
        return self._received_bytes + self._sender.sent_bytes

    @property
    def volume(self) -> Volume | None:
        """What the client works on."""
        return self._entrance.volume

    def present(self) -> bool:
        """See access.Attached."""
        return not (self._dead or self.disconnected or self.hung_up())

    @property
    def client(self) -> str:
        """Who is at the other end (identity.py)."""
        return self.peer.client

    def info(self) -> ClientStatus:
        """A snapshot for people and tools."""
        dispatch = self._dispatch
        return ClientStatus(
            connection=self.number,
            client=self.client,
            peer=str(self.peer),
            export=self.export,
            state="closing" if self._finishing or self._dead else self._handshake.state.name.lower(),
            connected_seconds=time.monotonic() - self._connected_at,
            request_count=dispatch.request_count if dispatch else 0,
            error_count=dispatch.error_count if dispatch else 0,
            in_flight=dispatch.in_flight if dispatch else 0,
            received_bytes=self._received_bytes,
            sent_bytes=self._sender.sent_bytes,
        )

    async def run(self) -> None:
        """Serve the client until it or `finish` ends the connection. Never raises for what the client does."""
        orderly = False
        try:
            orderly = await self._serve()
        except OSError as error:
            log.debug("connection lost peer=%s: %s", self.peer, error)
        except asyncio.CancelledError:
            if self._dispatch is not None:
                self._dispatch.cancel()
            raise
        finally:
            await self._close(orderly)

    def reconfigure(self, settings: ServerSettings) -> None:
        """These limits from now on."""
        self._settings = settings
        if self._slow is not None:
            self._slow.limit_seconds = settings.slow_request_seconds

    def stop(self) -> None:
        """Read nothing more; take the complete requests that have been received, as soon as they may be in flight, and
        `finish`."""
        if self._dispatch is not None:
            self._dispatch.hurry()
        if not self._admitted or self._memory_wait is not None:
            self.finish()
        elif not self._stopping:
            self._stopping = True
            self._pause()
            self._resume()

    def finish(self) -> None:
        """Take no more requests; answer what was taken, then end. A client in the handshake is told with its next
        option, if that comes soon."""
        if self._finishing or self._dead:
            return
        self._finishing = True
        self._took_all.set()
        if self._dispatch is None:
            self._handshake.stopping = True
            self._loop.call_later(self._settings.linger_seconds, self.abort, "the server is closing")
            return
        self._pause()
        if self._memory_wait is not None:
            self._memory_wait.cancel()
        self._check_end()

    def abort(self, reason: str) -> None:
        """End at once; replies that have not been sent are dropped."""
        if self._dead:
            return
        log.info("connection closed peer=%s: %s", self.peer, reason)
        self._die()

    def revoke(self, reason: str) -> None:
        """`abort`, and nothing that this connection has asked for and that has not happened yet happens any more."""
        self._revoked = True
        self.abort(reason)

    def alive(self) -> bool:
        """False: the peer hung up without DISC; what it asked for and has not happened yet must not happen."""
        if self.disconnected:
            return not self._revoked
        return not self._dead and (not self.hung_up() or self._leaves_in_order())

    def _leaves_in_order(self) -> bool:
        """Of a peer that has hung up: whether it has sent DISC behind what it asked for. proto.md: that is finished."""
        if self._in_order is None and self._transmission is not None:
            self._in_order = self._transmission.leads_to_disconnect(self._peek())
        return bool(self._in_order)

    def _peek(self) -> bytes:
        """What the peer has sent and nobody has read yet, as far as that can be told."""
        if isinstance(self._stream, TlsStream):
            return self._stream.peek(PEEK_BYTES_MAX)
        return self._watch.peek(PEEK_BYTES_MAX)

    async def settled(self) -> None:
        """Return when nothing that this connection has asked for can happen any more."""
        await self._took_all.wait()
        if self._dispatch is not None:
            await self._dispatch.settle()

    def hung_up(self) -> bool:
        """The peer will send nothing more."""
        return self._watch.hung_up()

    @property
    def disconnected(self) -> bool:
        """DISC was received."""
        return self._transmission is not None and self._transmission.disconnected

    # Handshake

    async def _serve(self) -> bool:
        """The connection's life; True: it shall be closed in order."""
        try:
            async with asyncio.timeout(self._settings.handshake_seconds) as limit:
                info = await self._shake_hands(limit)
        except TimeoutError:
            self._common.counts.failed_handshakes += 1
            log.info("handshake took too long peer=%s", self.peer)
            return False
        except ProtocolError as error:
            self._common.counts.failed_handshakes += 1
            log.info("handshake failed peer=%s: %s", self.peer, error)
            return True
        if info is None:
            return True
        self._begin_transmission()
        assert self.volume is not None
        self._share = self._common.turns.enter(self.volume)
        await self._common.entered(self)
        self._admitted = True
        log.info("client entered peer=%s export=%s", self.peer, self.export)
        if self._finishing:
            self._check_end()
        else:
            self._resume()
        await self._ended
        return not self._dead

    async def _shake_hands(self, limit: asyncio.Timeout) -> VolumeInfo | None:
        """Haggle until an export is open; None: the client goes. ProtocolError.

        limit: counts against the client only, so it stands still while a volume is being opened.
        """
        handshake = self._handshake
        await self._send_handshake()
        while True:
            event = handshake.step()
            if isinstance(event, Secure):
                await self._send_handshake()
                await self._start_tls()
            elif isinstance(event, Enter):
                limit.reschedule(None)
                info = await self._open(event.name)
                limit.reschedule(self._loop.time() + self._settings.handshake_seconds)
                await self._send_handshake()
                if info is not None:
                    return info
            elif event:
                await self._send_handshake()
            else:
                if handshake.state is State.CLOSED or self._finishing:
                    return None
                if isinstance(self._stream, TlsStream):
                    data = await self._stream.receive()
                else:
                    data = await self._loop.sock_recv(self._sock, HANDSHAKE_RECEIVE_BYTES)
                if not data:
                    return None
                self._received_bytes += len(data)
                handshake.receive(data)
                del data
            if handshake.state is State.CLOSED:
                return None

    async def _send_handshake(self) -> None:
        output = self._handshake.take_output()
        if output:
            if isinstance(self._stream, TlsStream):
                await self._stream.send_all(output)
            else:
                await self._loop.sock_sendall(self._sock, output)
            self._sender.sent_bytes += len(output)

    async def _start_tls(self) -> None:
        """The rest of the connection goes through TLS. ProtocolError: the client was told why not."""
        assert self._tls is not None
        stream = TlsStream(self._sock, self._tls.context, self._common.sealed_buffer)
        try:
            await stream.handshake()
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS: {error.reason or error}") from error
        self._stream = self._sender.stream = stream
        shown = stream.certificate()
        self.peer = dataclasses.replace(
            self.peer, certificate=distinguished_name(shown), names=certificate_names(shown)
        )
        self._view = self._entrance.view(self.peer, secure=True)
        self._handshake.secured(self._view)

    async def _open(self, name: str) -> VolumeInfo | None:
        """Open the volume behind an export and tell the handshake what came of it."""
        opened = await self._entrance.open(self._view, name, self._handshake.contexts_of(name))
        if not isinstance(opened, VolumeInfo):
            self._handshake.refused(*opened)
            return None
        self.export = name
        self._handshake.entered(opened)
        return opened

    # Transmission: receiving

    def _begin_transmission(self) -> None:
        assert self.volume is not None
        agreement = self._handshake.agreement
        style = replies.style(structured=agreement.structured, extended=agreement.extended)
        common = self._common
        self._slow = SlowWatch(common.slow, self.export or "", self.peer, self._settings.slow_request_seconds)
        if common.meters is not None:
            self._meter = common.meters.take(self.export or "")
        self._dispatch = Dispatch(
            self.volume,
            style,
            self,
            self._pool,
            common.reply_area,
            extended=agreement.extended,
            read_only=self._entrance.read_only,
            contexts=[(number, query_of(context, self._entrance.snapshots)) for number, context in agreement.contexts],
            meter=self._meter,
            slow=self._slow,
        )
        self._transmission = Transmission(
            common.receive_buffer,
            extended=agreement.extended,
            payload_bytes_max=REQUEST_BYTES_MAX,
            refuses=self._dispatch.refuses,
        )
        self._transmission.feed(self._handshake.take_rest())

    def _on_readable(self) -> None:
        turns, share = self._common.turns, self._share
        if share is not None and turns.contended(share):
            turns.queue(share, self)
        else:
            self._receive(ROUNDS_MAX)

    def take_turn(self) -> int:
        """See Turns."""
        dispatch = self._dispatch
        assert dispatch is not None
        if not self._reading:
            return 0
        before = dispatch.in_flight
        self._receive(1)
        return max(0, dispatch.in_flight - before)

    def _receive(self, rounds: int) -> None:
        """Receive, answer, send; poll a moment for the next request if nobody else is active."""
        common = self._common
        transmission = self._transmission
        assert transmission is not None
        stream = self._stream
        spin = rounds > 1 and common.last_active is self and self._settings.busy_poll_seconds > 0
        common.last_active = self
        for _ in range(rounds):
            buffers = transmission.buffers()
            try:
                if len(buffers) == 1:
                    length = stream.recv_into(buffers[0])
                else:
                    length = stream.recvmsg_into(buffers)[0]
            except BlockingIOError:
                break
            except OSError as error:
                log.debug("connection lost peer=%s: %s", self.peer, error)
                self._die()
                return
            if not length:
                self.finish()
                return
            self._received_bytes += length
            self._payload_since = None
            transmission.received(length)
            if not self._advance():
                return
            if not (spin and self._next_comes_soon()):
                break
        transmission.park()

    def _next_comes_soon(self) -> bool:
        """Poll for at most busy_poll_seconds. Not while something of this connection waits for the loop."""
        assert self._dispatch is not None
        if self._sender.waiting_since is not None or self._dispatch.in_flight:
            return False
        return self._common.busy_poll.readable(self._watch, self._settings.busy_poll_seconds)

    def _advance(self) -> bool:
        """Answer what has been received. False: receive no more for now (everything is parked, reading is paused)."""
        transmission = self._transmission
        dispatch = self._dispatch
        sender = self._sender
        assert transmission is not None
        assert dispatch is not None
        try:
            while not self._blocked():
                batch = transmission.requests(BATCH_REQUESTS_MAX, BATCH_READ_BYTES_MAX)
                if batch:
                    sender.in_batch = True
                    dispatch.run(batch)
                    sender.in_batch = False
                    sender.send()
                    if self._dead:
                        return False
                    if self._finishing:
                        self._check_end()
                        return False
                    if transmission.empty and not self._blocked():
                        return True
                elif transmission.disconnected:
                    self.finish()
                    return False
                elif transmission.wants_bytes and not self._stopping:
                    buffer = self._pool.take(transmission.wants_bytes)
                    if buffer is None:
                        transmission.park()
                        self._pause()
                        self._memory_wait = self._loop.create_task(self._wait_for_memory(transmission.wants_bytes))
                        return False
                    transmission.provide(buffer)
                else:
                    if transmission.receiving_payload:
                        self._payload_since = time.monotonic()
                    return True
        except ProtocolError as error:
            self._common.counts.broken += 1
            log.info("protocol broken peer=%s export=%s: %s", self.peer, self.export, error)
            self.finish()
            return False
        transmission.park()
        self._pause()
        return False

    def _blocked(self) -> bool:
        """No further request may be taken now."""
        dispatch = self._dispatch
        assert dispatch is not None
        settings = self._settings
        return (
            self._sender.unsent_bytes >= settings.reply_bytes_max
            or dispatch.held_bytes >= settings.held_bytes_max
            or dispatch.in_flight >= settings.requests_in_flight_max
            or dispatch.repeating
        )

    async def _wait_for_memory(self, length_bytes: int) -> None:
        """Get the buffer for a long payload when its turn has come, then go on reading."""
        try:
            buffer = await self._pool.acquire(length_bytes)
        finally:
            self._memory_wait = None
        assert self._transmission is not None
        if self._dead or self._finishing:
            self._pool.release(buffer)
            return
        self._transmission.provide(buffer)
        self._transmission.park()
        self._resume()

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _resume(self) -> None:
        """Answer what was left lying, then read again. What lay there may be older than a hang-up of the peer."""
        if self._reading or self._finishing or self._dead or self._memory_wait is not None or self._blocked():
            return
        assert self._dispatch is not None
        assert self._transmission is not None
        self._dispatch.cautious = not self.alive()
        began = time.perf_counter()
        goes_on = self._advance()
        if self._share is not None:
            self._common.turns.charge(self._share, time.perf_counter() - began)
        if goes_on:
            self._transmission.park()
            if self._stopping:
                self.finish()
                return
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    # What else dispatch wants of its Outbox

    def put(self, views: Sequence[memoryview | bytes], buffer: Buffer | None = None) -> None:
        self._sender.put(views, buffer)

    def put_area(self, length: int) -> None:
        self._sender.put_area(length)

    def task_ended(self) -> None:
        self._moved()

    # Ending

    def _check_end(self) -> None:
        """The end is reached when everything that was taken is answered and sent."""
        if self._sender.in_batch or not self._sender.idle or self._ended.done():
            return
        if self._dispatch is not None and not self._dispatch.in_flight:
            self._ended.set_result(None)

    def _moved(self) -> None:
        """The sender has got rid of something."""
        if self._finishing:
            self._check_end()
        elif self._dead:
            return
        elif not self._reading:
            self._resume()
        elif (
            self._common.last_active is self
            and not (self._share is not None and self._common.turns.contended(self._share))
            and self._sender.idle
            and self._settings.busy_poll_seconds > 0
            and self._next_comes_soon()
        ):
            self._on_readable()  # the client has got the answer that it waited for, and goes on

    def _lost(self, error: OSError) -> None:
        """The socket has failed. A peer that has sent DISC and doesn't wait for its replies gets none."""
        log.debug("connection lost peer=%s: %s", self.peer, error)
        if not self._finishing and self.hung_up() and self._leaves_in_order():
            self._sender.drop()
        else:
            self._die()

    def _die(self) -> None:
        """Nothing is received or sent any more. The socket goes now, the volume when the tasks have ended."""
        self._dead = True
        self._took_all.set()
        self._pause()
        if self._dispatch is not None and (self._revoked or not self.disconnected):
            self._dispatch.drop_limited()
        self._sender.drop()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if not self._ended.done():
            self._ended.set_result(None)

    async def _close(self, orderly: bool) -> None:
        """Release everything, the socket first unless the peer is to read our last bytes."""
        try:
            self._pause()
            if self._memory_wait is not None:
                self._memory_wait.cancel()
            if self._transmission is not None:
                buffer = self._transmission.abandon()
                if buffer is not None:
                    self._pool.release(buffer)
            if orderly and not self._dead:
                await self._linger()
        finally:
            if not self._dead:
                self._die()
            self._watch.close()
            self._sock.close()
            await self._give_volumes_back()

    async def _linger(self) -> None:
        """Shut down the sending side, then read and drop until the peer closes or the time is over."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(self._settings.linger_seconds):
                if isinstance(self._stream, TlsStream):
                    await self._stream.close()
                self._sock.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(self._sock, HANDSHAKE_RECEIVE_BYTES):
                    pass

    async def _give_volumes_back(self) -> None:
        if self._dispatch is not None:
            await self._dispatch.settle()
        if self._common.meters is not None and self._meter is not None:
            self._common.meters.give_back(self._meter)
            self._meter = None
        if self._share is not None:
            self._common.turns.leave(self._share, self)
            self._share = None
        await self._entrance.close()
