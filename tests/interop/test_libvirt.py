"""What README.md tells users of libvirt is what libvirt understands."""

import re
from pathlib import Path

import pytest

from tests.support.clients import run

README = Path(__file__).resolve().parents[2] / "README.md"
DISKS = re.findall(r"^```xml\n(<disk.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)

DOMAIN = """<domain type="kvm">
  <name>guest</name>
  <memory unit="MiB">512</memory>
  <os><type arch="x86_64">hvm</type></os>
  <devices>{disk}</devices>
</domain>
"""


def test_readme_has_disks() -> None:
    assert len(DISKS) == 2


@pytest.mark.parametrize("disk", DISKS)
async def test_disks_are_valid(tmp_path: Path, disk: str) -> None:
    (tmp_path / "domain.xml").write_text(DOMAIN.format(disk=disk))
    await run("virt-xml-validate", tmp_path / "domain.xml", "domain")


async def test_nonsense_is_not(tmp_path: Path) -> None:
    """The test above can fail."""
    (tmp_path / "domain.xml").write_text(DOMAIN.format(disk=DISKS[0].replace("<host", "<wait")))
    done = await run("virt-xml-validate", tmp_path / "domain.xml", "domain", check=False)
    assert done.code != 0
