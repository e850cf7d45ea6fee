"""A small virtual machine: Debian's cloud kernel, an initramfs made of this machine's own programs, one script.

The script is the whole life of the guest. It runs in busybox's shell with `set -e`; the machine ends with it. Its
network is qemu's user mode one: the host's loopback is 10.0.2.2 there, and the script reaches nothing else. The
processor is emulated: a /dev/kvm that can be opened and then fails or hangs is met too often where tests run.
"""

import asyncio
import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.support.clients import SYSTEM_PATH, find, unavailable

HOST: Final = "10.0.2.2"
"""The address at which the guest finds this machine's loopback."""
SECONDS_MAX: Final = 240.0
MODULES: Final = ("virtio_pci", "virtio_net", "virtio_blk", "ext4", "nbd")
DONE: Final = "guest: done"
REPOSITORY: Final = Path(__file__).resolve().parents[2]
_LIBRARY: Final = re.compile(r"(?:=> )?(/\S+) \(0x")

_SWITCH: Final = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox modprobe $module; done
until [ -b {root} ]; do /bin/busybox usleep 50000; done
/bin/busybox mount -o noatime {root} /new
exec /bin/busybox switch_root /new /bin/busybox sh /init
"""
"""The first program where the root file system is a disk's, which has an /init of its own."""

_INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin PYTHONPATH=/lib/ours PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
for module in {modules}; do modprobe $module || echo "guest: no module $module"; done
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
mkdir -p /mnt /tmp /run /var/run
mount -t tmpfs tmp /tmp && mount -t tmpfs run /run
if sh -ex /script 2>/tmp/trace; then echo "{done}"; else dmesg | tail -n 20; tail -n 20 /tmp/trace; fi
sync
poweroff -f
"""


def kernel() -> tuple[Path, str]:
    """The newest cloud kernel that is installed, and its version."""
    if platform.machine() != "x86_64":
        unavailable(f"the guest is an x86-64 one, this machine is {platform.machine()}")
    kernels = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=lambda path: path.stat().st_mtime)
    if not kernels or not os.access(kernels[-1], os.R_OK):
        unavailable("no kernel for a guest: apt-get install linux-image-cloud-amd64")
    return kernels[-1], kernels[-1].name.removeprefix("vmlinuz-")


def _output(*command: str | Path) -> str:
    environment = {**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C"}
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, env=environment
    ).stdout


def _copy(source: Path, root: Path) -> None:
    target = root / source.relative_to("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _add_program(program: str, root: Path) -> None:
    """The program into /sbin, the libraries that it needs to where it looks for them."""
    path = Path(find(program))
    (root / "sbin").mkdir(parents=True, exist_ok=True)
    shutil.copy(path, root / "sbin" / program)
    for library in _LIBRARY.findall(_output("ldd", path)):
        _copy(Path(library), root)


_NEEDED: Final = """
import sys
sys.path.insert(0, {root!r})
import runpy, {modules}
print(*sorted({{module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)}}), sep="\\n")
"""


def _add_python(modules: Sequence[str], root: Path) -> None:
    """Debian's interpreter, and what these modules of ours need of its library, all at the same paths as here."""
    interpreter = Path(find("python3")).resolve()
    program = _NEEDED.format(root=str(REPOSITORY), modules=", ".join(modules))
    used = [Path(line) for line in _output(interpreter, "-S", "-E", "-B", "-c", program).splitlines()]
    whole = {path.parent for path in used if path.parent.name in ("encodings", "importlib")}
    for path in [interpreter, *used, *(path for folder in whole for path in folder.glob("*.py"))]:
        if REPOSITORY in path.parents:
            target = root / "lib/ours" / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            continue
        _copy(path, root)
        if path == interpreter or path.suffix == ".so":
            for library in _LIBRARY.findall(_output("ldd", path)):
                _copy(Path(library), root)
    (root / "bin/python3").symlink_to(interpreter)


def _add_modules(version: str, root: Path) -> None:
    needed: dict[Path, None] = {}
    for module in MODULES:
        for line in _output(find("modprobe"), "--set-version", version, "--show-depends", module).splitlines():
            words = line.split()
            if words[0] == "insmod":
                needed[Path(words[1]).resolve()] = None
    folder = Path("/lib/modules").resolve() / version
    for path in needed:
        target = root / "lib/modules" / version / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("modules.order", "modules.builtin"):
        shutil.copy(folder / name, root / "lib/modules" / version / name)
    _output(find("depmod"), "--basedir", root, version)


def make_tree(root: Path, script: str, version: str, programs: Sequence[str] = ()) -> None:
    """What the guest's root file system holds."""
    (root / "bin").mkdir(parents=True)
    for folder in ("proc", "sys", "dev", "etc"):
        (root / folder).mkdir()
    shutil.copy(find("busybox"), root / "bin/busybox")
    for program in programs:
        _add_program(program, root)
    _add_modules(version, root)
    (root / "init").write_text(_INIT.format(modules=" ".join(MODULES), done=DONE))
    (root / "init").chmod(0o755)
    (root / "script").write_text(script)


class Machine:
    """One boot.

    directory: where its files are made. programs: what the script needs besides busybox; those that busybox has as well
    are called by their path, /sbin/NAME. drives: values of qemu's -drive. python: modules of ours that it can run, on
    the standard library.
    """

    def __init__(
        self,
        directory: Path,
        script: str,
        *,
        programs: Sequence[str] = (),
        drives: Sequence[str] = (),
        python: Sequence[str] = (),
        more: Sequence[str] = (),
        root_device: str = "",
    ) -> None:
        """more: further arguments of qemu. root_device: the disk that it goes on from, which has the script instead."""
        self.kernel, version = kernel()
        qemu = find("qemu-system-x86_64")
        root = directory / "root"
        make_tree(root, script, version, programs)
        if python:
            _add_python(python, root)
        if root_device:
            (root / "init").write_text(_SWITCH.format(modules=" ".join(MODULES), root=root_device))
        self._initramfs = directory / "initramfs"
        names = "\n".join(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
        with self._initramfs.open("wb") as archive:
            subprocess.run(
                [find("cpio"), "--quiet", "--create", "--format=newc", "--owner=0:0"],
                cwd=root,
                input=names.encode(),
                stdout=archive,
                check=True,
            )
        shutil.rmtree(root)
        self._command = [
            qemu,
            *("-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-m", "512", "-smp", "2", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
            *("-no-reboot", "-kernel", str(self.kernel), "-initrd", str(self._initramfs)),
            *("-append", "console=ttyS0 panic=-1 quiet random.trust_cpu=on"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
        ]
        for drive in drives:
            self._command += ["-drive", drive]
        self._command += more

    async def run(self, when: Mapping[str, Callable[[], Awaitable[None]]] | None = None) -> str:
        """Boot, run the script; what the guest printed. The script must have ended well.

        when: what is done here as soon as the guest has printed such a line, once each.
        """
        waiting = dict(when or {})
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = b""
        assert process.stdout is not None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SECONDS_MAX):
                    while piece := await process.stdout.read(1 << 16):
                        said += piece
                        for line in [line for line in waiting if line.encode() in said.splitlines()]:
                            await waiting.pop(line)()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
        text = said.decode(errors="replace").replace("\r\n", "\n")
        assert DONE in text.splitlines(), f"the guest did not end well:\n{text[-6000:]}"
        return text
