"""A file that a user names is read without waiting, and not without end."""

import errno
import os
import socket
from pathlib import Path

import pytest

from spotune.core import fingerprint
from spotune.core.config import read_yaml
from spotune.core.errors import InputError
from spotune.core.fingerprint import read_user_file, read_user_json
from spotune.launch.task import read_preemptions


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
    monkeypatch.setattr(fingerprint, "MOST_BYTES", 1 << 20)
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


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff[1]")
    assert read_user_json(path) == [1]
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot be read: not JSON"):
            read_user_json(path)


class Kernels:
    """A file as the kernel's own may be: it has nothing to say, or cannot be read."""

    def __init__(self, fault: OSError | None = None) -> None:
        self._fault = fault

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int) -> None:
        if self._fault:
            raise self._fault


def test_files_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kmsg"
    path.touch()

    def reading(file: Kernels) -> None:
        monkeypatch.setattr(fingerprint, "open", lambda *_, **__: file, raising=False)

    reading(Kernels())
    assert "kmsg: cannot be read: it would have to be waited for" in refusal(path)
    reading(Kernels(OSError(errno.EINVAL, "Invalid argument")))
    assert "kmsg: cannot be read: " in refusal(path)
    reading(Kernels(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output") as raised:  # another machine may read it
        read_user_file(path)
    assert raised.value.filename == str(path)
