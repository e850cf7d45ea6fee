"""Exit codes and error lines of the command `sheepfold`; cli_arguments.py has its options, cli_commands.py the rest."""

import os
import sys
from collections.abc import Sequence
from typing import Final

from nbdserver.attach.errors import AttachError
from nbdserver.cli_arguments import EXIT_USAGE, build_parser
from objstore import errors

EXIT_CODES: Final[dict[type[errors.StoreError], int]] = {
    errors.StoreError: 1,
    errors.InvalidRequest: EXIT_USAGE,
    errors.NotFound: 3,
    errors.Exists: 4,
    errors.Busy: 5,
    errors.Suspended: 5,
    errors.NoSpace: 6,
    errors.Unavailable: 7,
    errors.Corrupt: 8,
    errors.FormatError: 8,
}
"""README.md, "Exit codes". 0 is success; an error of the operating system is 1, Ctrl-C is 130."""

EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process: whoever started it closed it
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path need not be valid text
    try:
        arguments = build_parser().parse_args(argv)
        from nbdserver import cli_commands

        code = cli_commands.run(arguments)
        sys.stdout.flush()
    except errors.StoreError as error:
        return _fail(str(error), exit_code(error))
    except AttachError as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return EXIT_CODES[errors.StoreError]
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        return _fail(f"{named}{error.strerror or error}", EXIT_CODES[errors.StoreError])
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def exit_code(error: errors.StoreError) -> int:
    """The code of the error's nearest class that has one."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.splitlines())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    print("sheepfold: error:", shown, file=sys.stderr)
    return code
