"""What SkyPilot prints of a job, as the lines that the job printed."""

import re
from collections.abc import Iterable, Iterator

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# (NAME, pid=123) text, and (worker1, rank=1, pid=123, ip=10.0.0.2) text
_PREFIX = re.compile(r"^\((?P<name>[^()]*?)(?:, rank=(?P<rank>\d+))?, pid=\d+(?:, ip=[^)]*)?\) ?")
_OF_SKYPILOT = re.compile(
    r"^(?:[├└]── |↳|✓ |✗ |⚙︎|[⠀-⣿]|Hint: |(?:Managed )?[Jj]ob finished|Waiting for task |<sky-payload|"
    r"The job cluster is preempted|Start streaming logs|ERROR: Job \d+ failed with return code)"
)


def lines_of(pieces: Iterable[str | None]) -> Iterator[str]:
    """Whole lines from a stream of text; a last one that was never ended too."""
    rest = ""
    for piece in pieces:
        if piece is None:
            break
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def said(line: str) -> str | None:
    """A line as the program wrote it, None where SkyPilot itself speaks. Of several machines the rank is kept."""
    line = _COLOUR.sub("", line).rstrip("\r")
    found = _PREFIX.match(line)
    if not found:
        return None if _OF_SKYPILOT.match(line) or not line.strip() else line
    text = line[found.end() :]
    rank = found["rank"]
    return f"[{rank}] {text}" if rank and rank != "0" else text
