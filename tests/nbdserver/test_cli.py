"""The command line up to the point where it needs a store: arguments, error lines, exit codes, help, completion."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserver.cli import EXIT_CODES, exit_code, main
from nbdserver.cli_arguments import SHELLS
from objstore import errors


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHEEPFOLD_CONFIG", raising=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr of a command that must fail."""
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sheepfold: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert isinstance(code, int)
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ((), "COMMAND"),
        (("vdi",), "COMMAND"),
        (("frobnicate",), "'frobnicate'"),
        (("vdi", "frobnicate"), "'frobnicate'"),
        (("vdi", "create", "a"), "SIZE"),
        (("vdi", "create", "a", "10X"), "'10X'"),
        (("vdi", "create", "a", "0"), "0 bytes"),
        (("vdi", "create", "a", "16385T"), "bytes is not possible"),
        (("vdi", "create", "a", "1.3K"), "'1.3K'"),
        (("vdi", "create", "a/b", "1G"), "'a/b'"),
        (("vdi", "create", "a\nb", "1G"), "'a\\nb'"),
        (("vdi", "create", "x" * 201, "1G"), "201 bytes"),
        (("vdi", "create", "a\udcff", "1G"), "'a\\udcff'"),
        (("vdi", "create", "", "1G"), "empty"),
        (("vdi", "create", "a", "1G", "--copies", "0"), "'0'"),
        (("vdi", "create", "a", "1G", "--copies", "-1"), "-1"),
        (("vdi", "create", "a", "1G", "--copies", "two"), "'two'"),
        (("vdi", "create", "a", "1G", "--mode", "fast"), "'fast'"),
        (("vdi", "info", ".hidden"), "'.hidden'"),
        (("vdi", "delete"), "NAME"),
        (("serve", "--zone"), "--zone"),
        (("serve", "--vdi", "disk"), "'disk'"),
        (("serve", "--vdi", "disk:"), "''"),
        (("serve", "--vdi", ":1G"), "empty"),
        (("serve", "--vdi", "a:b:1G"), "'b:1G'"),
        (("serve", "--zon", "x"), "--zon"),
        (("serve",), "--zone DIR"),
        (("status",), "--zone DIR"),
        (("vdi", "list"), "--config FILE"),
        (("status", "--config", "/nowhere/sheepfold.toml"), "/nowhere/sheepfold.toml"),
        (("completion", "fish"), "'fish'"),
    ],
)
def test_bad_arguments_get_one_line_that_names_the_offender(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], offender: str
) -> None:
    code, line = fails(capsys, *arguments)
    assert code == 2
    assert offender in line


def test_the_environment_names_the_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHEEPFOLD_CONFIG", str(tmp_path / "absent.toml"))
    code, line = fails(capsys, "status")
    assert code == 2
    assert str(tmp_path / "absent.toml") in line


def test_every_store_error_has_an_exit_code_of_its_kind() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.StoreError)]
    codes = {kind.__name__: exit_code(kind("why")) for kind in kinds}
    assert codes["InvalidRequest"] == codes["OutOfRange"] == 2
    assert codes["NotFound"] == 3
    assert codes["Busy"] == 5
    assert codes["Fenced"] == EXIT_CODES[errors.StoreError] == 1
    assert 0 not in codes.values()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(
        word in script for word in ("serve", "create", "--prealloc" if shell != "tcsh" else "prealloc", "--zone")
    )


def test_the_bash_script_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["completion", "bash"])
    script = tmp_path / "sheepfold.bash"
    script.write_text(capsys.readouterr().out)
    line = (
        f". {script}; COMP_WORDS=(sheepfold vdi create --pre); COMP_CWORD=3; "
        '_shtab_sheepfold sheepfold --pre create; echo "${COMPREPLY[@]}"'
    )
    completed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == ["--prealloc"]


def test_help_and_usage_errors_load_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from nbdserver.cli import main\n"
        "for arguments in (['--help'], ['serve', '--help'], ['vdi', 'create', 'a', '1X'], ['--version']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "main(['status'])\n"
        "heavy = {'numpy', 'aiohttp', 'asyncio', 'uvloop', 'msgspec', 'shtab', 'tqdm', 'http'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_went_away_is_no_traceback() -> None:
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    command = [sys.executable, "-m", "nbdserver", "completion", "bash"]
    done = subprocess.run(command, stdout=writing_end, stderr=subprocess.PIPE, check=False)
    os.close(writing_end)
    assert done.returncode == 1
    assert done.stderr == b""
