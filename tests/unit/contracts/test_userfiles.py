"""A file that a user names is read without waiting, and not without end."""

import os
import socket
from pathlib import Path

import pytest

from spotune.contracts import userfiles
from spotune.contracts.config import read_yaml
from spotune.contracts.errors import InputError
from spotune.contracts.userfiles import read_user_file
from spotune.launch.preemptions import read_preemptions


def refusal(path: str | Path) -> str:
    with pytest.raises(InputError) as raised:
        read_user_file(path)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_what_is_not_a_plain_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "is a FIFO (name a plain file)" in refusal(tmp_path / "fifo")
        assert "is a FIFO" in refusal(tmp_path / "link")
        assert "cannot be read: " in refusal(tmp_path / "socket")
    assert "is a device" in refusal("/dev/zero")
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "nothing")
    assert "cannot be read" in refusal("a\0b")


def test_a_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfiles, "MOST_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(b"a" * ((1 << 20) + 1))
    assert "has more than 1 MiB (is it the right file?)" in refusal(tmp_path / "large")


def test_other_letters(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert "save the file as UTF-8" in refusal(tmp_path / "latin")


def test_configs_and_plans_are_read_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read in (read_yaml, read_preemptions):
        with pytest.raises(InputError, match="is a FIFO"):
            read(tmp_path / "fifo")
