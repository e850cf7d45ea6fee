"""`python3 -m tests`: sets up .venv from the lock file, then runs every test in shares. Standard library only.

    python3 -m tests                 everything
    python3 -m tests --setup-only    only make or renew .venv
    python3 -m tests ARGUMENTS...    hand these to one pytest run in .venv instead

The last line adds up the shares the way pytest's own last line does; exit code 0 only if every share passed.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements-dev.lock"
STAMP = VENV / "installed-from"
CLOSING_LINE = re.compile(r"=+ (?P<counts>.*\d+ \w+.*) in [\d.]+s.*=+")
NO_TESTS = 5
"""pytest's exit code when a marker selects nothing."""


class Share(NamedTuple):
    """One pytest run: what it is called, and its arguments."""

    title: str
    arguments: tuple[str, ...]


def shares(workers: int) -> tuple[Share, ...]:
    """Quick tests first, so that a mistake shows early; real clients last, with the machine to themselves."""
    parallel = ("-n", str(workers), "--dist", "worksteal")
    return (
        Share("unit, contract, specification", ("-m", "not slow and not interop and not bench", *parallel)),
        Share("crashes, power cuts", ("-m", "slow and not interop and not bench", "--ignore=tests/sim", *parallel)),
        Share("simulation (its own processes)", ("tests/sim", "-m", "slow and not interop and not bench", "-s")),
        Share("real clients", ("-m", "interop and not bench", "--ignore=tests/guests")),
        Share("guests", ("tests/guests",)),
    )


def set_up() -> None:
    """Make .venv from the lock file, unless it was made from this very lock file and Python."""
    wanted = hashlib.sha256(
        LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes() + sys.version.encode()
    ).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
        return
    print(f"setting up {VENV}", flush=True)
    quiet = ("--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "venv", VENV)
    run(PYTHON, "-m", "pip", "install", *quiet, "--require-hashes", "-r", LOCK)
    run(PYTHON, "-m", "pip", "install", *quiet, "--no-deps", "--no-build-isolation", "-e", ROOT)
    STAMP.write_text(wanted)


def run(*command: str | Path) -> None:
    finished = subprocess.run([str(part) for part in command], check=False)
    if finished.returncode:
        sys.exit(f"tests: failed with {finished.returncode}: {' '.join(map(str, command))}")


def run_share(share: Share, counts: Counter[str]) -> int:
    """Run one share, pass its output on, add its closing line to `counts`; returns pytest's exit code."""
    print(f"\n----- {share.title}: pytest {' '.join(share.arguments)}", flush=True)
    pytest = subprocess.Popen(
        [str(PYTHON), "-m", "pytest", *share.arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert pytest.stdout is not None
    for line in pytest.stdout:
        print(line, end="", flush=True)
        if match := CLOSING_LINE.fullmatch(line.strip()):
            for number, word in re.findall(r"(\d+) (\w+)", match["counts"]):
                counts[word.removesuffix("s") + "s" if word in ("error", "warning") else word] += int(number)
    return pytest.wait()


def main(arguments: list[str]) -> int:
    set_up()
    if arguments == ["--setup-only"]:
        return 0
    if arguments:
        return subprocess.run([str(PYTHON), "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode
    counts: Counter[str] = Counter()
    failed = []
    started = time.monotonic()
    for share in shares(os.cpu_count() or 1):
        share_started = time.monotonic()
        code = run_share(share, counts)
        print(f"----- {share.title}: {time.monotonic() - share_started:.0f} s, pytest exit code {code}", flush=True)
        if code not in (0, NO_TESTS):
            failed.append(share.title)
    if failed:
        print("\nfailed shares: " + "; ".join(failed))
    counts.pop("deselected", None)
    summary = ", ".join(f"{number} {word}" for word, number in sorted(counts.items())) or "no tests ran"
    print(f"\n===== {summary} in {time.monotonic() - started:.2f}s =====")
    return 1 if failed or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
