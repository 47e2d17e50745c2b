"""The frame of the command-line tools: arguments that many share, logging, exit statuses.

A tool parses its arguments first and imports what needs torch afterwards, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from maskrcnn.errors import InputError


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add CONFIG (`args.config`, a Path) and `--set KEY=VALUE`, again and again (`args.overrides`, a list)."""
    count = "?" if optional else None
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs=count, help="the experiment, a YAML file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="set one key of the configuration, such as model.roi.kind=roi_pool; may be repeated",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device` (`args.device`, text)."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a tool and leave the process: status 0 done, 2 wrong input, 130 interrupted.

    Any other exception goes on to the interpreter, which prints the traceback and leaves with status 1.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, the shell's convention
    sys.exit(0)


def setup_logging(log_file: Path | None = None, *, process: int = 0) -> None:
    """Send log records to stderr as plain lines and, with times, to the end of `log_file`.

    The console shows the package from INFO on, the file from DEBUG on; other libraries speak from WARNING on. A
    second call replaces the first. Of several processes, numbered from 0, the first speaks for all: the others show
    warnings alone, with their number.
    """
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter(f"process {process}: %(message)s" if process else "%(message)s"))
    console.setLevel(logging.WARNING if process else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("maskrcnn").setLevel(logging.DEBUG)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr above any progress bar, which a plain stream handler would cut in two."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)  # what the standard handlers do: logging must not stop the program
