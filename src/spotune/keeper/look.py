"""One look at everything."""

from __future__ import annotations

from collections.abc import Callable

from spotune.keeper.cpu import cpu_look
from spotune.keeper.gpu import gpu_look
from spotune.keeper.jobs import job_look
from spotune.keeper.jupyter import jupyter_look
from spotune.keeper.log import log
from spotune.keeper.processes import processes
from spotune.keeper.sessions import editor_look, session_look
from spotune.keeper.settings import Settings
from spotune.keeper.signs import Sign

MOST_SAID = 100
Look = Callable[[float], list[Sign]]


def look(settings: Settings) -> Look:
    """Returns a function from now to all signs of work."""
    cpu = cpu_look(settings.cpu_share)
    said: set[str] = set()

    def everywhere(now: float) -> list[Sign]:
        everybody = processes(settings.slurm_job)
        looks: dict[str, Callable[[], list[Sign]]] = {
            "jobs": lambda: job_look(settings.runtime, settings.job_id, now),
            "GPUs": lambda: gpu_look(settings.gpu_percent, now),
            "processes": lambda: cpu(everybody, now),
            "ssh sessions": lambda: session_look(everybody, now),
            "VS Code": lambda: editor_look(everybody, now),
            "Jupyter": lambda: jupyter_look(settings.jupyter_runtime, now),
        }
        return [sign for name, one in looks.items() for sign in _safely(name, one, said)]

    return everywhere


def _safely(name: str, look: Callable[[], list[Sign]], said: set[str]) -> list[Sign]:
    """The signs of one look. One that fails is logged once: the others must still hold the cluster."""
    try:
        return look()
    except Exception as error:
        line = f"cannot look at {name}: {type(error).__name__}: {error}"
        if line not in said and len(said) < MOST_SAID:
            said.add(line)
            log(line)
        return []
