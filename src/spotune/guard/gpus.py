"""How busy this machine's GPUs are while the ranks run, and how full: an event every 15 s, for the cost report."""

import subprocess
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from spotune.guard.journal import Journal
from spotune.guard.say import say

EVERY_S = 15.0
TIMEOUT_S = 15.0
END_S = 20.0
_QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"
_MIB_PER_GIB = 1024.0


class GpuMeter:
    """Asks nvidia-smi for as long as its block lasts; does nothing on a machine without a GPU.

    ``utilization.gpu`` is the share of the last sample period, at most a second, in which a kernel ran: nvidia-smi(1).
    Of several machines the first one is measured, as it is the one whose events are read.
    """

    def __init__(self, gpus: int, environ: Mapping[str, str], journal: Journal, every_s: float = EVERY_S) -> None:
        self._gpus, self._journal, self._every_s = gpus, journal, every_s
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        self._command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gpus", daemon=True)

    def __enter__(self) -> Self:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._gpus:
            self._thread.join(END_S)  # nvidia-smi may hang with the driver

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                done = subprocess.run(self._command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
            except subprocess.TimeoutExpired:  # a busy machine: the next sample may come in time
                continue
            except (OSError, subprocess.SubprocessError) as error:
                say(f"GPUs are not measured: {error}")
                return
            if sample := read_sample(done.stdout):
                self._journal.write("gpu", **sample)


def read_sample(listing: str) -> dict[str, float] | None:
    """The GPUs of one answer as one: mean busy share, GiB used by the fullest, GiB of that one.

    None where nvidia-smi does not know, as for a slice of a GPU (``[N/A]``).
    """
    rows = []
    for line in listing.splitlines():
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError:
            return None
    if not rows or any(len(row) != 3 for row in rows):
        return None
    fullest = max(rows, key=lambda row: row[1])
    return {
        "busy": round(sum(row[0] for row in rows) / len(rows) / 100, 4),
        "memory_gib": round(fullest[1] / _MIB_PER_GIB, 3),
        "memory_total_gib": round(fullest[2] / _MIB_PER_GIB, 3),
    }
