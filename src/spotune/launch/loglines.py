"""A log that comes in pieces, as whole lines of bounded length."""

from collections.abc import Iterator

MOST_CHARS = 1 << 20  # of a line; the rest of a longer one is counted, not kept


class LogLines:
    """What is left of a piece waits for the next one.

    Of a line that was rewritten many times, as progress bars do, the last version is kept.
    """

    def __init__(self, most_chars: int = MOST_CHARS) -> None:
        self._most_chars = most_chars
        self._rest, self._left_out = "", 0

    def add(self, text: str) -> Iterator[str]:
        """Yields the lines that end in this piece."""
        *ends, rest = text.split("\n")
        for end in ends:
            self._append(end)
            yield self._take()
        self._append(rest)

    def last(self) -> Iterator[str]:
        """Yields a last line that was never ended."""
        if self._rest:
            yield self._take()

    def _append(self, text: str) -> None:
        line = text if self._left_out else self._rest + text
        if self._left_out and "\r" not in line.rstrip("\r"):
            self._left_out += len(line)
        elif len(line) <= self._most_chars and not self._left_out:
            self._rest = line
        else:
            line = line[line.rstrip("\r").rfind("\r") + 1 :]  # its last version
            self._rest, self._left_out = line[: self._most_chars], max(0, len(line) - self._most_chars)

    def _take(self) -> str:
        line, left_out = self._rest, self._left_out
        self._rest, self._left_out = "", 0
        return f"{line} … ({left_out} more characters)" if left_out else line
