"""Processes that compute: the user's, not SkyPilot's own."""

from __future__ import annotations

import re
from collections.abc import Callable

from spotune.keeper.processes import Process
from spotune.keeper.signs import Sign

# SkyPilot's runtime, Ray below it, the log streams of Slurm, and the keeper: they tick over on an idle cluster too.
_INFRASTRUCTURE = re.compile(
    r"sky\.skylet|skypilot-runtime|sky_job_|spotune\.keeper|/ray/|raylet|gcs_server|ray::IDLE|\bsrun\b|slurmstepd|sshd"
)


def cpu_look(share: float) -> Callable[[dict[int, Process], float], list[Sign]]:
    """Returns a function that compares with what it saw the last time; the first time it sees nothing."""
    before: dict[tuple[int, int], float] = {}
    last: list[float] = []

    def look(everybody: dict[int, Process], now: float) -> list[Sign]:
        seen = {(process.pid, process.started): process.cpu_s for process in everybody.values()}
        elapsed = now - last[0] if last else 0.0
        signs = []
        for process in everybody.values():
            # A process that is new has used what it has since the last look, a child that ended is its parent's.
            used = process.cpu_s - before.get((process.pid, process.started), 0.0)
            if elapsed > 0 and used / elapsed > share and not _INFRASTRUCTURE.search(process.command):
                signs.append(Sign(f"{process.name} uses {100 * used / elapsed:.0f} % of a core", now))
        before.clear()
        before.update(seen)
        last[:] = [now]
        return signs

    return look
