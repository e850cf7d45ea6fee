"""objstore/README.md: its programs run, its tables name what there is."""

import re
import subprocess
import sys
from pathlib import Path

import objstore
from objstore.access.blocking import BlockingConnection, BlockingVdi

TEXT = (Path(objstore.__file__).parent / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def methods(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}


def test_the_programs_run_one_after_the_other(tmp_path: Path) -> None:
    assert len(PROGRAMS) >= 2
    for program in PROGRAMS:
        program = program.replace("/srv/", f"{tmp_path}/")
        done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_public_method_is_in_a_table() -> None:
    table = "".join(line for line in TEXT.splitlines(keepends=True) if line.startswith("|"))
    named = set(re.findall(r"`(?:Connection\.|VdiHandle\.)?(\w+)", table))
    for kind in (objstore.Connection, objstore.VdiHandle):
        assert methods(kind) <= named, kind
    for name in sorted((methods(BlockingConnection) | methods(BlockingVdi)) - named):
        assert re.search(rf"`(vdi\.)?{name}\(", TEXT), name


def test_every_error_is_named() -> None:
    kinds = [value for value in (getattr(objstore, name) for name in objstore.__all__) if isinstance(value, type)]
    for kind in kinds:
        if issubclass(kind, objstore.StoreError) and kind not in (
            objstore.FormatError,
            objstore.NewerFormat,
            objstore.NotSupported,
        ):
            assert f"`{kind.__name__}`" in TEXT
