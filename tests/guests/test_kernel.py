"""The Linux kernel as our client: attached with nbd-client in a virtual machine, with a file system on the disk."""

from pathlib import Path

from tests.guests.conftest import Served
from tests.guests.machine import HOST, Machine
from tests.support.clients import run

SCRIPT = """
attach() {{ /sbin/nbd-client -N disk {host} {port} /dev/nbd0 "$@" >/dev/null; }}

attach -connections 4 -block-size 4096
[ "$(blockdev --getsize64 /dev/nbd0)" = {size} ]
[ "$(blockdev --getbsz /dev/nbd0)" = 4096 ]
[ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ]
[ "$(cat /sys/block/nbd0/queue/fua)" = 1 ]
[ "$(cat /sys/block/nbd0/queue/discard_max_bytes)" != 0 ]
/sbin/mke2fs -q -t ext4 -E nodiscard /dev/nbd0
mount /dev/nbd0 /mnt
for n in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/random$n bs=64k count=40 2>/dev/null &
done
wait
for n in $(seq 50); do dd if=/dev/urandom of=/mnt/synced$n bs=4k count=4 conv=fsync 2>/dev/null; done
yes "a line of text" | head -c 3000001 > /mnt/text
sha256sum /mnt/random* /mnt/synced* /mnt/text > /tmp/sums
fstrim /mnt
rm /mnt/random8
sync
fstrim /mnt
umount /mnt
/sbin/e2fsck -f -n /dev/nbd0
/sbin/nbd-client -d /dev/nbd0 >/dev/null
echo "guest: written"

attach -block-size 512
[ "$(blockdev --getbsz /dev/nbd0)" = 4096 ] || [ "$(blockdev --getbsz /dev/nbd0)" = 512 ]
/sbin/e2fsck -f -n /dev/nbd0
mount -o ro /dev/nbd0 /mnt
grep -v random8 /tmp/sums > /tmp/left
[ "$(wc -l < /tmp/left)" = 58 ]
sha256sum -c /tmp/left
umount /mnt
/sbin/nbd-client -d /dev/nbd0 >/dev/null
echo "guest: compared"
"""

DISCARD = """
/sbin/nbd-client -N disk {host} {port} /dev/nbd0 -connections 4 -block-size 4096 -swap >/dev/null
dd if=/dev/urandom of=/dev/nbd0 bs=1M count=16 2>/dev/null
sync
blkdiscard -o 1048576 -l 8388608 /dev/nbd0
echo 3 > /proc/sys/vm/drop_caches
[ "$(dd if=/dev/nbd0 bs=1M skip=1 count=8 2>/dev/null | tr -d '\\000' | wc -c)" = 0 ]
[ "$(dd if=/dev/nbd0 bs=1M count=1 2>/dev/null | tr -d '\\000' | wc -c)" -gt 1000000 ]
mkswap /dev/nbd0 >/dev/null
swapon /dev/nbd0
mkdir /ballast /group
mount -t tmpfs -o size=100m ballast /ballast
mount -t cgroup2 group /group
echo +memory > /group/cgroup.subtree_control
mkdir /group/small
echo 25165824 > /group/small/memory.max
echo $$ > /group/small/cgroup.procs
for n in 1 2 3 4; do dd if=/dev/urandom of=/ballast/$n bs=1M count=10 2>/dev/null; done
sha256sum /ballast/* > /tmp/sums
sha256sum -c /tmp/sums
used=$(awk '/nbd0/ {{ print $4 }}' /proc/swaps)
echo "guest: swap used $used"
echo 268435456 > /group/small/memory.max
rm /ballast/*
swapoff /dev/nbd0
/sbin/nbd-client -d /dev/nbd0 >/dev/null
"""

PROGRAMS = ("nbd-client", "mke2fs", "e2fsck")


async def test_a_file_system_on_an_attached_disk(served: Served, tmp_path: Path) -> None:
    """Four connections, 4 KiB and 512 byte blocks; written, trimmed, detached, attached again, compared, checked. Then
    our own copy of the disk is sound as well."""
    script = SCRIPT.format(host=HOST, port=served.port, size=256 << 20)
    said = await Machine(tmp_path / "guest", script, programs=PROGRAMS).run()
    assert "guest: written" in said
    assert "guest: compared" in said
    image = tmp_path / "image"
    await run("nbdcopy", served.uri, image)
    await run("e2fsck", "-f", "-n", image)


async def test_discard_and_swap(served: Served, tmp_path: Path) -> None:
    """What blkdiscard drops reads as zeros, its neighbours stay; swapping to the disk loses no page."""
    script = DISCARD.format(host=HOST, port=served.port)
    said = await Machine(tmp_path / "guest", script, programs=PROGRAMS).run()
    used = [line for line in said.splitlines() if line.startswith("guest: swap used")]
    assert used, said
    assert int(used[0].split()[-1]) > 8 << 10, "40 MiB are kept in 24 MiB of memory"
