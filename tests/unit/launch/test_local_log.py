"""A run's log as it grows."""

import os
import tracemalloc
from pathlib import Path

import pytest

from spotune.cli.runs import settled
from spotune.core.io import MOST_CHARS, LogLines
from spotune.launch.local.engine import _Tail
from spotune.launch.skypilot.client import lines_of


def test_the_log_never_tears_a_character_or_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    tail, seen = _Tail(path), list[list[str]]()
    for piece in (b"", b"one\ntw", b"o \xc3", b"\xa4\nla", b"st"):
        with open(path, "ab") as log:
            log.write(piece)
        seen.append(list(tail.lines()))
    assert seen == [[], ["one"], [], ["two ä"], []]
    assert list(tail.last()) == ["last"]


def test_a_log_that_is_not_there_yet_has_no_lines(tmp_path: Path) -> None:
    tail = _Tail(tmp_path / "log.txt")
    assert (list(tail.lines()), list(tail.last())) == ([], [])


def test_of_a_log_without_end_the_last_part_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"first\n")
    os.truncate(path, 20 << 30)
    with open(path, "ab") as log:
        log.write(b"\nlast line\n")
    tail = _Tail(path, most_bytes=100)
    said, cut, last = tail.lines()
    assert said == f"… {(20 << 30) + 11 - 100} bytes are not shown ({path})"
    assert (len(cut), last) == (100 - 11, "last line")
    with open(path, "ab") as log:
        log.write(b"one more\n")
    assert list(tail.lines()) == ["one more"]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short\nlonger than ten\nend", ["short", "longer tha … (5 more characters)", "end"]),
        ("1%\r10%\r50%\r100%\nend", ["100%", "end"]),
        ("a\r" * 40 + "\n", ["a"]),
    ],
)
def test_of_a_long_line_the_start_is_kept_or_its_last_version(text: str, lines: list[str], size: int) -> None:
    log = LogLines(most_chars=10)
    found = [line for at in range(0, len(text), size) for line in log.add(text[at : at + size])]
    found += log.last()
    assert [settled(line) for line in found] == lines


def test_a_line_of_100_mb_is_bounded(tmp_path: Path) -> None:
    path, count = tmp_path / "log.txt", 100
    with open(path, "wb") as log:
        for _ in range(count):
            log.write(b"x" * (1 << 20))
        log.write(b"\nnext\n")
    tracemalloc.start()
    try:
        first, second = _Tail(path).lines()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(first), second) == (MOST_CHARS + len(f" … ({count * (1 << 20) - MOST_CHARS} more characters)"), "next")
    assert peak < 16 << 20
    pieces = ("x" * (1 << 20) for _ in range(count))
    assert [len(line) for line in lines_of(pieces)] == [len(first)]
