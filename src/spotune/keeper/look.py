"""One look at everything."""

from __future__ import annotations

from collections.abc import Callable

from spotune.keeper.cpu import cpu_look
from spotune.keeper.gpu import gpu_look
from spotune.keeper.jobs import job_look
from spotune.keeper.jupyter import jupyter_look
from spotune.keeper.processes import processes
from spotune.keeper.sessions import editor_look, session_look
from spotune.keeper.settings import Settings
from spotune.keeper.signs import Sign

Look = Callable[[float], list[Sign]]


def look(settings: Settings) -> Look:
    """Returns a function from now to all signs of work."""
    cpu = cpu_look(settings.cpu_share)

    def everywhere(now: float) -> list[Sign]:
        everybody = processes(settings.slurm_job)
        return [
            *job_look(settings.runtime, settings.job_id, now),
            *gpu_look(settings.gpu_percent, now),
            *cpu(everybody, now),
            *session_look(everybody, now),
            *editor_look(everybody, now),
            *jupyter_look(settings.jupyter_runtime, now),
        ]

    return everywhere
