"""What SkyPilot prints of a job, as the lines that the job printed."""

import re
from collections.abc import Iterable, Iterator

from spotune.core.io import LogLines

_TAKEN_DOWN = 137  # SkyPilot kills the others when one machine's process fails
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# (NAME, pid=123) text, and (worker1, rank=1, pid=123, ip=10.0.0.2) text
_PREFIX = re.compile(r"^\((?P<name>[^()]*?)(?:, rank=(?P<rank>\d+))?, pid=\d+(?:, ip=[^)]*)?\) ?")
_OF_SKYPILOT = re.compile(
    r"^(?:[├└]── |↳|✓ |✗ |⚙︎|[⠀-⣿]|Hint: |(?:Managed )?[Jj]ob finished|Waiting for task |<sky-payload|"
    r"The job cluster is preempted|Start streaming logs|ERROR: Job \d+ failed with return code)"
)
# What follows a last line that the program did not end, on that line.
_GLUED = re.compile(r"[✓✗] Job finished \(status: [A-Z_]+\)\.$")
_CODES = re.compile(r"^ERROR: Job \d+ failed with return code list: *\[([\d, ]+)\]", re.MULTILINE)
_BEGIN, _END = re.compile(r"^== Logs of the user job \(ID: \d+\) ==$"), re.compile(r"^== End of logs \(ID: \d+\) ==$")


def plain(text: str) -> str:
    """Without SkyPilot's colours."""
    return _COLOUR.sub("", text)


def lines_of(pieces: Iterable[str | None]) -> Iterator[str]:
    """Whole lines from a stream of text; a last one that was never ended too. None is SkyPilot's spinner moving."""
    lines = LogLines()
    for piece in pieces:
        yield from lines.add(piece or "")
    yield from lines.last()


def exit_code(log: str) -> int | None:
    """What the program of a failed job ended with, None where the log does not say it."""
    found = _CODES.search(plain(log))
    return deciding(int(code) for code in found[1].split(",")) if found else None


def deciding(codes: Iterable[int]) -> int:
    """Of several machines' exit codes the first of one that failed by itself; 0 when none failed."""
    failed = [code for code in codes if code]
    return next((code for code in failed if code != _TAKEN_DOWN), failed[0] if failed else 0)


def begins(line: str) -> bool:
    """Whether a log begins here: of a further machine, where one stream goes on to it."""
    return plain(line).startswith("├── Waiting for task resources")


def said(line: str) -> str | None:
    """A line as the program wrote it, None where SkyPilot itself speaks. Of several machines the rank is kept."""
    line = plain(line).rstrip("\r")
    found = _PREFIX.match(line)
    if not found:
        return None if _OF_SKYPILOT.match(line) or not line.strip() else line
    text = _GLUED.sub("", line[found.end() :])
    rank = found["rank"]
    return f"[{rank}] {text}" if rank and rank != "0" else text


def attempts_in(controller: Iterable[str]) -> list[list[str]]:
    """What the program printed in each attempt that ended by itself, from the controller's log.

    SkyPilot keeps a job's log of its last machine only, but its controller copies what it reads before it lets a
    machine go. Of a machine that vanished there was nothing left to read.
    """
    found: list[list[str]] = []
    inside = False
    for line in controller:
        bare = plain(line).strip()
        if _BEGIN.match(bare):
            found.append([])
            inside = True
        elif _END.match(bare):
            inside = False
        elif inside and (text := said(line)) is not None:
            found[-1].append(text)
    return found
