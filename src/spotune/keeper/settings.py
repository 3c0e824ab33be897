"""What the keeper is told: by the environment, which is read here and nowhere else on this side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

IDLE = "SPOTUNE_IDLE_MINUTES"  # without work for so long: the keeper ends
LEAD = "SPOTUNE_AUTOSTOP_MINUTES"  # SkyPilot's own autostop, which counts from there; for what `dev ls` says
ENDS = "SPOTUNE_KEEPER_ENDS"  # `scancel`: take the Slurm job down as well, where autostop does not
LOOK = "SPOTUNE_KEEPER_LOOK_S"
CPU = "SPOTUNE_KEEPER_CPU"
GPU = "SPOTUNE_KEEPER_GPU"


@dataclass(frozen=True)
class Settings:
    """How the keeper judges.

    Attributes:
        look_s: seconds between two looks.
        cpu_share: a process that used more than this share of one core since the last look works.
        gpu_percent: a GPU that is used more than this works.
        folder: where the state file is, and the mark of the newest keeper.
        runtime: SkyPilot's folder on this machine; ``job_id`` is the keeper's own job in it.
        slurm_job: the allocation, empty where there is none.
        ends: what the keeper does at the end beside ending.
    """

    idle_s: float
    lead_s: float
    look_s: float
    cpu_share: float
    gpu_percent: float
    home: Path
    runtime: Path
    job_id: int | None
    slurm_job: str
    ends: str
    jupyter_runtime: Path

    @property
    def folder(self) -> Path:
        return self.home / ".spotune"

    @property
    def state_file(self) -> Path:
        return self.folder / "keeper.json"

    @classmethod
    def read(cls, environ: Mapping[str, str], home: Path) -> Settings:
        """Raises ValueError, one line, for a setting that cannot be."""
        own = environ.get("SKYPILOT_INTERNAL_JOB_ID", "")
        jupyter = environ.get("JUPYTER_RUNTIME_DIR") or home / ".local" / "share" / "jupyter" / "runtime"
        return cls(
            idle_s=60 * _number(environ, IDLE, 28),
            lead_s=60 * _number(environ, LEAD, 0),
            look_s=_number(environ, LOOK, 20),
            cpu_share=_number(environ, CPU, 0.25),
            gpu_percent=_number(environ, GPU, 2),
            home=home,
            runtime=Path(environ.get("SKY_RUNTIME_DIR") or home),
            job_id=int(own) if own.isdecimal() else None,
            slurm_job=environ.get("SLURM_JOB_ID", ""),
            ends=environ.get(ENDS, ""),
            jupyter_runtime=Path(jupyter),
        )


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise ValueError(f"{name}: {text!r} is not a number, 0 or more")
    return number
