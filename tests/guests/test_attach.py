"""`sheepfold attach` in a virtual machine: a device that outlives its server, and one that must not."""

import asyncio
import sys
from pathlib import Path

from tests.crash.server import REPOSITORY
from tests.guests.conftest import Served
from tests.guests.machine import HOST, Machine
from tests.support.clients import run

MODULES = ("nbdserver.attach.__main__",)
FLUSHER = """
import ctypes
from nbdserver.flusher import lock_memory, mark_as_flusher
assert mark_as_flusher() and ctypes.CDLL(None).prctl(58, 0, 0, 0, 0) == 1
lock_memory()
"""
"""58: PR_GET_IO_FLUSHER."""
PROGRAMS = ("mke2fs", "e2fsck")
URI = f"nbd://{HOST}:{{port}}/disk"

SETUP = """
attach() {{ python3 -m nbdserver.attach attach "$@"; }}
detach() {{ python3 -m nbdserver.attach detach "$@"; }}
heard() {{ dmesg | grep -q "sheepfold: .*$1"; }}
until_heard() {{ until heard "$1"; do usleep 100000; done; }}
"""

RESTART = (
    SETUP
    + """
attach {uri} /dev/nbd0 --timeout 3 --connections 2 | grep -x /dev/nbd0
grep -x "[0-9a-f]*:1:1:0" /sys/block/nbd0/backend
/sbin/mke2fs -q -t ext4 -E nodiscard /dev/nbd0
mount /dev/nbd0 /mnt
if detach /dev/nbd0; then exit 1; fi
(
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=/mnt/synced$((n % 64)) bs=16k count=2 conv=fsync 2>/dev/null || echo "guest: I/O error"
    done
    echo "$n" > /tmp/rounds
) &
load=$!
dd if=/dev/urandom of=/mnt/random bs=64k count=200 2>/dev/null
usleep 500000
echo "guest: under load"
until_heard "are lost"
until_heard "connections are there again"
echo "guest: connected again"
before=$(stat -c %Y /mnt/synced1)
sync
touch /tmp/stop
wait $load
[ "$(cat /tmp/rounds)" -gt 2 ]
sha256sum /mnt/synced* /mnt/random > /tmp/sums
umount /mnt
echo "guest: grow"
until [ "$(blockdev --getsize64 /dev/nbd0)" = {grown} ]; do usleep 100000; done
detach /dev/nbd0
attach {uri} /dev/nbd0
/sbin/e2fsck -f -n /dev/nbd0
mount -o ro /dev/nbd0 /mnt
sha256sum -c /tmp/sums >/dev/null
umount /mnt
detach /dev/nbd0
if dmesg | grep -E "I/O error|Buffer I/O|EXT4-fs error"; then exit 1; fi
echo "guest: compared"
"""
)

KILLED = (
    SETUP
    + """
python3 -c '{flusher}'
attach {uri} /dev/nbd0 --timeout 3 --connections 2 --dead-timeout 60
until grep -q "^VmLck:[[:space:]]*[1-9]" /proc/$(pidof python3)/status; do usleep 50000; done
dd if=/dev/urandom of=/dev/nbd0 bs=64k count=16 conv=fsync 2>/dev/null
dd if=/dev/urandom of=/dev/nbd0 bs=64k count=16 seek=16 2>/dev/null
echo "guest: written"
until_heard "given up: .* is another disk now, or has lost writes"
if dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync 2>/dev/null; then exit 1; fi
echo "guest: refused"
attach {uri} /dev/nbd0
cat /sys/block/nbd0/backend
grep -x "[0-9a-f]*:1:1:[1-9][0-9]*" /sys/block/nbd0/backend
dd if=/dev/nbd0 of=/dev/null bs=64k count=32
detach /dev/nbd0
"""
)


async def test_a_device_outlives_a_restart_of_its_server(served: Served, tmp_path: Path) -> None:
    """A file system under load while the server stops and starts: no I/O error, everything is there. Then the disk
    grows, and the device with it."""
    grown = 300 << 20

    async def restart() -> None:
        await served.server.stop()
        await served.server.start()

    async def grow() -> None:
        command = (sys.executable, "-m", "nbdserver", "vdi", "resize", "disk", "300M", "--zone", str(tmp_path / "a"))
        process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdout=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0

    script = RESTART.format(uri=URI.format(port=served.port), grown=grown)
    machine = Machine(tmp_path / "guest", script, programs=PROGRAMS, python=MODULES)
    said = await machine.run({"guest: under load": restart, "guest: grow": grow})
    assert "guest: connected again" in said
    assert "guest: compared" in said
    assert "guest: I/O error" not in said
    image = tmp_path / "image"
    await run("nbdcopy", served.uri, image)
    await run("e2fsck", "-f", "-n", image)


async def test_a_device_is_given_up_when_acknowledged_writes_may_be_lost(served: Served, tmp_path: Path) -> None:
    """The server is killed with writes that nobody has flushed: the kernel must not go on as if they were there. And
    what a root with all capabilities may do about its memory is done, by server and agent."""

    async def kill() -> None:
        served.server.kill()
        await served.server.ended()
        await served.server.start()

    script = KILLED.format(uri=URI.format(port=served.port), flusher=FLUSHER)
    machine = Machine(tmp_path / "guest", script, python=(*MODULES, "nbdserver.flusher"))
    said = await machine.run({"guest: written": kill})
    assert "guest: refused" in said
