"""A guest whose root file system is an export, through QEMU's own NBD client."""

import asyncio
import socket
from pathlib import Path

from tests.guests.conftest import Served
from tests.guests.machine import HOST, Machine, kernel, make_tree
from tests.support.clients import run

SCRIPT = """
grep -q "^/dev/vda / ext4" /proc/mounts
mkdir -p /data
(
    n=0
    until [ -e /run/stop ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=/data/synced$((n % 32)) bs=16k count=2 conv=fsync 2>/dev/null || echo "guest: I/O error"
    done
    echo "$n" > /run/rounds
) &
load=$!
until [ -e /data/synced3 ]; do usleep 50000; done
echo "guest: under load"
until nc -w 1 {host} {signal} </dev/null 2>/dev/null; do usleep 200000; done
dd if=/dev/urandom of=/data/after bs=64k count=20 conv=fsync 2>/dev/null
touch /run/stop
wait $load
[ "$(cat /run/rounds)" -gt 3 ]
echo 3 > /proc/sys/vm/drop_caches
sha256sum /data/* > /data.sums
sync
echo 3 > /proc/sys/vm/drop_caches
sha256sum -c /data.sums >/dev/null
if dmesg | grep -E "I/O error|EXT4-fs error|Remounting"; then exit 1; fi
mount -o remount,ro /
echo "guest: compared"
"""


async def test_a_guest_boots_from_an_export_and_outlives_a_restart(served: Served, tmp_path: Path) -> None:
    """`-blockdev driver=nbd` with reconnect-delay: the server stops and starts under a root file system that is being
    written; the guest sees a pause and no error, and the disk is sound afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        signal = free.getsockname()[1]
    _, version = kernel()
    make_tree(tmp_path / "tree", SCRIPT.format(host=HOST, signal=signal), version)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    await run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "tree", image)
    await run("nbdcopy", "--flush", image, served.uri)
    restarted: list[asyncio.Server] = []

    async def restart() -> None:
        await served.server.stop()
        await served.server.start()
        restarted.append(await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", signal))

    drive = f"driver=nbd,node-name=root,server.type=unix,server.path={served.server.address.removeprefix('unix://')}"
    more = ("-blockdev", f"{drive},export=disk,reconnect-delay=60", "-device", "virtio-blk-pci,drive=root")
    machine = Machine(tmp_path / "guest", "", root_device="/dev/vda", more=more)
    try:
        said = await machine.run({"guest: under load": restart})
    finally:
        for server in restarted:
            server.close()
            await server.wait_closed()
    assert "guest: compared" in said
    assert "guest: I/O error" not in said
    await run("nbdcopy", served.uri, image)
    await run("e2fsck", "-f", "-n", image)
