"""GPUs in use, as nvidia-smi says."""

from __future__ import annotations

import subprocess

from spotune.keeper.signs import Sign

_QUERY = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]


def gpu_look(percent: float, now: float) -> list[Sign]:
    """A sign for each GPU above the threshold. Memory that is held without computing is no work."""
    try:
        listed = subprocess.run(_QUERY, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    signs = []
    for line in listed.decode(errors="replace").splitlines():
        index, _, used = (part.strip() for part in line.partition(","))
        if used.isdecimal() and float(used) > percent:  # a MIG slice says [N/A]
            signs.append(Sign(f"GPU {index} at {used} %", now))
    return signs
