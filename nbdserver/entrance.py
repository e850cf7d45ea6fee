"""From the name of an export to open volumes: what one connection may see and enter, and what it has open."""

import socket

from nbdserver.access import Attached, Right
from nbdserver.common import Common
from nbdserver.exports import View, snapshot_of
from nbdserver.failures import open_volume
from nbdserver.identity import Peer
from nbdserver.keepalive import ONE_WRITER
from nbdserver.wire.constants import OptionReply
from objstore.volume.base import Volume, VolumeInfo

Refusal = tuple[OptionReply, str]


class Entrance:
    """One connection's. `open` once, and `close` always.

    who: the connection, as others see it. Attributes change between `open` and its end, and in `close`.
    """

    def __init__(self, common: Common, who: Attached, sock: socket.socket) -> None:
        self.volume: Volume | None = None
        self.snapshots: dict[str, Volume] = {}
        """Those that contexts compare with, by tag."""
        self.read_only = False
        """For this client."""
        self._common = common
        self._who = who
        self._sock = sock

    def view(self, peer: Peer, *, secure: bool) -> View:
        """The exports that there are for this client."""
        return View(self._common.exports, peer, secure=secure)

    async def open(self, view: View, name: str, contexts: tuple[str, ...]) -> VolumeInfo | Refusal:
        """Open an export, by its real name, and the snapshots that contexts compare it with."""
        common = self._common
        source = common.exports.source
        if self._who.client in common.fences:
            return OptionReply.ERR_POLICY, f"{self._who.client} is fenced"
        seen = view.describe(name)
        if seen is None:
            return OptionReply.ERR_UNKNOWN, f"no such export {name!r}"
        if seen.refused:
            return OptionReply.ERR_POLICY, seen.refused
        opened = await open_volume(source, name, common.complain)
        if isinstance(opened, tuple):
            return opened
        self.volume = opened
        self.read_only = opened.read_only or view.right(name) is not Right.WRITE
        rules = common.exports.access.of(name)
        refusal = common.attachments.attach(self._who, opened, rules, writes=not self.read_only)
        if refusal is not None:
            common.complain(("access", name), "client refused export=%s client=%s: %s", name, self._who.client, refusal)
            await self.close()
            return OptionReply.ERR_POLICY, refusal
        if rules.one_writer:
            ONE_WRITER.apply(self._sock)
        for tag in dict.fromkeys(map(snapshot_of, contexts)):
            if tag is not None:
                compared = await open_volume(source, f"{name.partition('@')[0]}@{tag}", common.complain)
                if isinstance(compared, tuple):
                    await self.close()
                    return compared
                self.snapshots[tag] = compared
        known = source.peek(name)
        identity = "" if known is None else known.identity
        return VolumeInfo(name, opened.size_bytes, self.read_only, opened.description, identity=identity)

    async def close(self) -> None:
        """Give everything back. Idempotent."""
        source = self._common.exports.source
        while self.snapshots:
            await source.close(self.snapshots.popitem()[1])
        volume, self.volume = self.volume, None
        if volume is not None:
            self._common.attachments.detach(self._who, volume)
            await source.close(volume)
