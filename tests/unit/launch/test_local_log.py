"""A run's log as it grows."""

from pathlib import Path

from spotune.launch.local.infra import _Tail


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
