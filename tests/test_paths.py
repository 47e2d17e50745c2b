"""Reading of files that a user names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskrcnn.paths import expand, open_file, read_file


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand("~/data") == Path("/home/someone/data")
    assert expand("data/~") == Path("data/~")
    assert expand("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert read_file(tmp_path / "file") == b"a\xef\xbb\xbf"


def test_only_regular_files_within_the_limit_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("large")
    reasons = {
        "absent": "No such file",
        "pipe": "it is a pipe",
        "loop": "symbolic links",
        "": "Is a directory",
        "large/x": "Not a directory",
        "a\0b": "null character",
        "x" * 300: "too long",
        "/dev/zero": "a device",
        "link": "it has 5 bytes, more than 4",
    }
    for name, reason in reasons.items():
        with pytest.raises(OSError, match=reason) as caught:
            open_file(tmp_path / name, most=4)
        assert caught.value.strerror
    with open_file(tmp_path / "link", most=5) as file:
        assert file.read() == b"12345"
