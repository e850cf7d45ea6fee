"""The kernel's NBD driver, through generic netlink (linux/netlink.h, linux/genetlink.h, linux/nbd-netlink.h).

Device numbers are those of /dev/nbdN; all of it takes CAP_SYS_ADMIN.
"""

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from nbdserver.attach.errors import UNAVAILABLE, AttachError
from nbdserver.attach.handshake import Export

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
NLMSG_ERROR: Final = 2
NLM_F_REQUEST_ACK: Final = 1 | 4
GENL_ID_CTRL: Final = 16
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2
CTRL_ATTR_MCAST_GROUPS: Final = 7
CTRL_ATTR_MCAST_GRP_NAME: Final = 1
CTRL_ATTR_MCAST_GRP_ID: Final = 2
NLA_TYPE: Final = 0x3FFF
NLA_NESTED: Final = 0x8000

CMD_CONNECT: Final = 1
CMD_DISCONNECT: Final = 2
CMD_RECONFIGURE: Final = 3
CMD_LINK_DEAD: Final = 4
CMD_STATUS: Final = 5
ATTR_INDEX: Final = 1
ATTR_SIZE_BYTES: Final = 2
ATTR_BLOCK_SIZE_BYTES: Final = 3
ATTR_TIMEOUT: Final = 4
ATTR_SERVER_FLAGS: Final = 5
ATTR_CLIENT_FLAGS: Final = 6
ATTR_SOCKETS: Final = 7
ATTR_DEAD_CONN_TIMEOUT: Final = 8
ATTR_DEVICE_LIST: Final = 9
ATTR_BACKEND_IDENTIFIER: Final = 10
SOCK_ITEM: Final = 1
SOCK_FD: Final = 1
DEVICE_ITEM: Final = 1
DEVICE_CONNECTED: Final = 2
FAMILY: Final = "nbd"
GROUP: Final = "nbd_mc_group"

_MESSAGE: Final = struct.Struct("=IHHII")
_GENERIC: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def sockets(descriptors: Sequence[int]) -> bytes:
    """NBD_ATTR_SOCKETS."""
    items = (attribute(SOCK_ITEM | NLA_NESTED, u32(SOCK_FD, one)) for one in descriptors)
    return attribute(ATTR_SOCKETS | NLA_NESTED, b"".join(items))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each. ValueError: cut short."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise ValueError("a netlink attribute is cut short")
        yield kind & NLA_TYPE, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4


class Message(NamedTuple):
    """A generic netlink message. error: errno of an NLMSG_ERROR, 0 = acknowledged, None = another kind."""

    family: int
    sequence: int
    command: int
    body: bytes
    error: int | None = None


def pack_message(message: Message) -> bytes:
    data = _GENERIC.pack(message.command, 1, 0) + message.body
    return _MESSAGE.pack(_MESSAGE.size + len(data), message.family, NLM_F_REQUEST_ACK, message.sequence, 0) + data


def unpack_messages(data: bytes) -> Iterator[Message]:
    """All of a datagram. ValueError: cut short."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, family, _, sequence, _ = _MESSAGE.unpack_from(data, at)
        if not _MESSAGE.size <= length <= len(data) - at:
            raise ValueError("a netlink message is cut short")
        body = data[at + _MESSAGE.size : at + length]
        if family == NLMSG_ERROR:
            yield Message(family, sequence, 0, b"", -struct.unpack_from("=i", body)[0])
        elif len(body) >= _GENERIC.size:
            yield Message(family, sequence, body[0], body[_GENERIC.size :])
        at += length + -length % 4


class Kernel:
    """The kernel's NBD driver, over one netlink socket. Its errors are OSError."""

    def __init__(self) -> None:
        """AttachError: the driver is not there."""
        self._socket = _netlink()
        self._sequence = 0
        try:
            self._family, self.group = self._find_family()
        except OSError:
            with contextlib.suppress(OSError):
                subprocess.run(["modprobe", "nbd"], check=False, capture_output=True)
            try:
                self._family, self.group = self._find_family()
            except OSError as error:
                self._socket.close()
                raise AttachError(
                    f"the kernel has no NBD driver (modprobe nbd): {error.strerror}", UNAVAILABLE
                ) from error

    def close(self) -> None:
        self._socket.close()

    def connect(
        self,
        index: int | None,
        descriptors: Sequence[int],
        export: Export,
        identifier: str,
        *,
        block_bytes: int,
        timeout_seconds: int,
        dead_seconds: int,
    ) -> int:
        """Make a device of these connections; its number. index: None = any that is free."""
        body = b"" if index is None else u32(ATTR_INDEX, index)
        body += u64(ATTR_SIZE_BYTES, export.size_bytes) + u64(ATTR_BLOCK_SIZE_BYTES, block_bytes)
        body += u64(ATTR_TIMEOUT, timeout_seconds) + u64(ATTR_DEAD_CONN_TIMEOUT, dead_seconds)
        body += u64(ATTR_SERVER_FLAGS, export.flags) + text(ATTR_BACKEND_IDENTIFIER, identifier)
        body += sockets(descriptors)
        for message in self._ask(CMD_CONNECT, body):
            found = dict(attributes(message.body)).get(ATTR_INDEX)
            if found is not None:
                return int(struct.unpack("=I", found[:4])[0])
        if index is None:
            raise OSError(errno.EPROTO, "the kernel does not say which device it has made")
        return index

    def reconfigure(self, index: int, descriptors: Sequence[int], size_bytes: int, identifier: str) -> None:
        """Put connections in the place of dead ones (those that are too many are left alone), and set the size."""
        body = u32(ATTR_INDEX, index) + u64(ATTR_SIZE_BYTES, size_bytes) + text(ATTR_BACKEND_IDENTIFIER, identifier)
        if descriptors:
            body += sockets(descriptors)
        self._ask(CMD_RECONFIGURE, body)

    def disconnect(self, index: int) -> None:
        self._ask(CMD_DISCONNECT, u32(ATTR_INDEX, index))

    def connected(self, index: int) -> bool:
        """Whether there is such a device and somebody has connected it."""
        try:
            answers = self._ask(CMD_STATUS, u32(ATTR_INDEX, index))
        except FileNotFoundError:
            return False
        for message in answers:
            devices = dict(attributes(message.body)).get(ATTR_DEVICE_LIST, b"")
            for kind, item in attributes(devices):
                if kind == DEVICE_ITEM:
                    return dict(attributes(item)).get(DEVICE_CONNECTED, b"\0")[0] != 0
        return False

    def _find_family(self) -> tuple[int, int]:
        """Number of the family and of its group."""
        answers = self._ask(CTRL_CMD_GETFAMILY, text(CTRL_ATTR_FAMILY_NAME, FAMILY), GENL_ID_CTRL)
        for message in answers:
            found = dict(attributes(message.body))
            for _, item in attributes(found.get(CTRL_ATTR_MCAST_GROUPS, b"")):
                group = dict(attributes(item))
                if group.get(CTRL_ATTR_MCAST_GRP_NAME, b"").rstrip(b"\0").decode() == GROUP:
                    family = struct.unpack("=H", found[CTRL_ATTR_FAMILY_ID][:2])[0]
                    return int(family), int(struct.unpack("=I", group[CTRL_ATTR_MCAST_GRP_ID][:4])[0])
        raise OSError(errno.ENOENT, "the family has no such group")

    def _ask(self, command: int, body: bytes, family: int | None = None) -> list[Message]:
        """Send, and read up to the acknowledgement."""
        self._sequence += 1
        message = Message(self._family if family is None else family, self._sequence, command, body)
        self._socket.send(pack_message(message))
        answers: list[Message] = []
        while True:
            for answer in unpack_messages(self._socket.recv(1 << 16)):
                if answer.sequence != self._sequence:
                    continue
                if answer.error is None:
                    answers.append(answer)
                elif answer.error:
                    raise OSError(answer.error, os.strerror(answer.error))
                else:
                    return answers


def _netlink() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    except OSError as error:
        raise AttachError(f"no netlink socket: {error.strerror}", UNAVAILABLE) from error
    sock.bind((0, 0))
    return sock


def dead_links(group: int) -> socket.socket:
    """A socket, non-blocking, that tells of connections that have died: see `read_dead_links`."""
    sock = _netlink()
    sock.setblocking(False)
    sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    return sock


def read_dead_links(sock: socket.socket) -> list[int] | None:
    """The devices of which a connection has died since the last call, one by one; None: some were not told."""
    found: list[int] = []
    lost = False
    while True:
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return None if lost else found
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            lost = True
            continue
        for message in unpack_messages(data):
            index = dict(attributes(message.body)).get(ATTR_INDEX)
            if message.command == CMD_LINK_DEAD and index is not None:
                found.append(struct.unpack("=I", index[:4])[0])
