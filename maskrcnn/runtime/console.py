"""The console of a command: exit status, and logging to stderr and a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from maskrcnn.errors import InputError

LONGEST_LINE = 4000  # characters of a message


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit with status 0 (success), 2 (InputError, or an OSError with a file) or 130 (interrupted).

    An OSError that names a file comes from the user's disk or path: it is full, read-only, too long, ... Any other
    exception propagates: the interpreter prints the traceback and exits with status 1.
    """
    try:
        main()
    except InputError as error:
        print("\n".join(map(_shortened, f"error: {error}".split("\n"))), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, the shell's convention
    sys.exit(0)


def _shortened(line: str) -> str:
    """Return a line of a message without the middle part of a very long value that it repeats."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 2 :]}"


def setup_logging(log_file: Path | None = None, *, process: int = 0) -> None:
    """Log to stderr as plain lines and, with timestamps, append to `log_file`.

    The level of this package is INFO for the console and DEBUG for the file; that of other libraries is WARNING. A
    second call replaces the handlers of the first.

    Args:
        log_file: the file to append to; None logs to stderr only.
        process: rank of this process. Processes other than 0 show only warnings, prefixed with their rank, and none of
            the data, which are the same for all.
    """
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter(f"process {process}: %(message)s" if process else "%(message)s"))
    console.setLevel(logging.WARNING if process else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("maskrcnn").setLevel(logging.DEBUG)
    # Every process reads the same annotations; one says what is wrong with them.
    logging.getLogger("maskrcnn.data").setLevel(logging.ERROR if process else logging.NOTSET)


class _LogFile(logging.FileHandler):
    """Leaves out what cannot be written: a full disk must not add a traceback to each line of the console."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of the base class)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr above a progress bar. A plain stream handler would break the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)  # as the standard handlers do: a logging error must not stop the program
