"""Arguments, exit statuses and logging of the tools."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from maskrcnn.cli.arguments import add_config_arguments, number, whole_number
from maskrcnn.errors import InputError
from maskrcnn.runtime.console import run_main, setup_logging


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(arguments)


def test_the_configuration_and_its_overrides() -> None:
    args = parse("x.yaml", "--set", "a.b=1", "--set", "c=[1, 2]")
    assert args.config == Path("x.yaml")
    assert args.overrides == ["a.b=1", "c=[1, 2]"]
    assert parse("x.yaml").overrides == []  # the default is not shared between calls


def test_wrong_arguments_exit_with_status_2() -> None:
    with pytest.raises(SystemExit) as exited:
        parse()
    assert exited.value.code == 2


@pytest.mark.parametrize(
    ("option", "text"),
    [("--score", text) for text in ("2", "-0.1", "nan", "inf", "x", "")]
    + [("--count", text) for text in ("0", "11", "1.5", "1e30", "x", "9" * 5000)],
)
def test_numbers_have_limits(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--score", type=number(0, 1))
    parser.add_argument("--count", type=whole_number(1, 10))
    assert parser.parse_args(["--score", "1", "--count", "10"]) == argparse.Namespace(score=1.0, count=10)
    with pytest.raises(SystemExit) as exited:
        parser.parse_args([f"{option}={text}"])
    assert exited.value.code == 2
    expected = "number from 0 to 1" if option == "--score" else "whole number from 1 to 10"
    assert f"argument {option}: expected a {expected}, got " in capsys.readouterr().err


def done() -> None:
    pass


def long_input() -> None:
    raise InputError("x" * 10**6)


def wrong_input() -> None:
    raise InputError("x.yaml: 1 problem\n  roi: missing")


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "out/1.png")


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "status", "message"),
    [
        (done, 0, ""),
        (wrong_input, 2, "error: x.yaml: 1 problem\n  roi: missing\n"),
        (full_disk, 2, "error: out/1.png: No space left on device\n"),
        (long_input, 2, f"error: {'x' * 1993} [...] {'x' * 2000}\n"),
        (interrupted, 130, "interrupted\n"),
    ],
)
def test_exit_status(main: Callable[[], None], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        run_main(main)
    assert exited.value.code == status
    assert capsys.readouterr() == ("", message)


def test_other_exceptions_keep_their_traceback() -> None:
    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_main(broken)


@pytest.mark.usefixtures("logging_restored")
def test_plain_lines_on_the_console_and_times_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_file = tmp_path / "train.log"
    log_file.write_text("the first run\n")
    setup_logging(log_file)
    logging.getLogger("maskrcnn.engine").info("step %d", 20)
    logging.getLogger("maskrcnn.engine").debug("a detail")
    logging.getLogger("other").info("not shown")
    logging.getLogger("other").warning("disk is full")
    assert capsys.readouterr() == ("", "step 20\ndisk is full\n")
    first, *lines = log_file.read_text().splitlines()
    assert first == "the first run"
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(rf"{time} INFO step 20\n{time} DEBUG a detail\n{time} WARNING disk is full", "\n".join(lines))


@pytest.mark.usefixtures("logging_restored")
def test_the_log_file_leaves_out_what_a_full_disk_refuses_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path / "train.log")
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler))
    with monkeypatch.context() as patch:
        patch.setattr(handler.stream, "write", lambda text: (_ for _ in ()).throw(OSError(28, "No space left")), False)
        logging.getLogger("maskrcnn").info("step 20")
    assert capsys.readouterr().err == "step 20\n"
    handler.handle(logging.LogRecord("maskrcnn", logging.INFO, __file__, 1, "%d", ("no number",), None))
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_restored")
def test_a_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logging.getLogger("maskrcnn").info("once")
    assert capsys.readouterr().err == "once\n"


@pytest.mark.usefixtures("logging_restored")
def test_a_line_does_not_run_into_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    setup_logging()
    with tqdm(total=2, file=stderr, ncols=40, leave=False) as bar:
        bar.update()
        logging.getLogger("maskrcnn").info("step 1")
    output = stderr.getvalue()
    assert re.search(r"\r +\rstep 1\n", output)  # the bar is cleared before the line is written


@pytest.mark.usefixtures("logging_restored")
def test_other_processes_show_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(process=3)
    logging.getLogger("maskrcnn.something").info("hidden")
    logging.getLogger("maskrcnn.something").warning("careful")
    assert capsys.readouterr().err == "process 3: careful\n"


@pytest.mark.usefixtures("logging_restored")
def test_one_process_warns_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    for process, expected in ((3, ""), (0, "dropped\n")):
        setup_logging(process=process)
        logging.getLogger("maskrcnn.data.coco").warning("dropped")
        assert capsys.readouterr().err == expected
