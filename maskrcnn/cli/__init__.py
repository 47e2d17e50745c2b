"""The command `maskrcnn` and its subcommands, one module each.

A subcommand is a module with a docstring (its help), `add_arguments(parser)` and `run(args)`. It imports modules that
need torch inside `run`, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import NoReturn

import shtab

from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.threads import set_thread_defaults

COMMANDS = (
    "train",
    "eval",
    "predict",
    "ablate",
    "convert-weights",
    "convert-dataset",
    "init-dataset",
    "export",
    "explain-roi",
    "show-config",
    "inspect-dataset",
    "replay-batch",
)


def main(command: str | None = None) -> NoReturn:
    """Run `maskrcnn COMMAND ...`, or one command whose arguments follow directly, as `tools/COMMAND.py` does.

    The exit status is 0 for success, 1 for a failure, 2 for invalid input; 130 and 143 after SIGINT and SIGTERM.
    """
    set_thread_defaults()
    run_main(lambda: _run(command))


def _run(command: str | None) -> None:
    if command is None:
        args = _parser().parse_args()
        args.run(args)
    else:
        module = _module(command)
        parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=_KeepLines)
        module.add_arguments(parser)
        module.run(parser.parse_args())


_KeepLines = argparse.RawDescriptionHelpFormatter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maskrcnn", description="Train, evaluate and ablate Mask R-CNN from YAML.")
    parser.add_argument("--version", action="version", version=f"maskrcnn {version('maskrcnn')}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        assert module.__doc__ is not None
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=_KeepLines)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _module(command: str) -> ModuleType:
    return import_module(f"maskrcnn.cli.{command.replace('-', '_')}")
