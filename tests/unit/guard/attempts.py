"""An attempt's context, journal and checkpoints, as tests of the guard's parts need them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.core.keys import Keys
from spotune.core.protocol import TRAINER, Staged, staged_path, write_json
from spotune.core.records import AttemptRecord, RunRecord
from spotune.core.store import Store
from spotune.guard.journal import Context, Machine

KEYS = Keys("a-run")
RUN = RunRecord(run_id="a-run", created_at=0, user="u", config_path="c", config={}, config_sha256="c", data_sha256="d")
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "deep/weights.safetensors")


def make_context(
    store: Store,
    folder: Path,
    attempt: int = 1,
    run: RunRecord = RUN,
    environ: Mapping[str, str] | None = None,
    patience_s: float = 60.0,
) -> Context:
    return Context(
        store=store,
        keys=KEYS,
        run=run,
        record=AttemptRecord(run_id="a-run", attempt=attempt, claimed_at=0, claim_id="x"),
        machine=Machine.read({}),
        environ=environ or {},
        scratch=folder / "scratch",
        cache=folder / "cache",
        status_file="",
        patience_s=patience_s,
    )


def make_checkpoint(folder: Path, step: int, leave_out: str = "", **facts: Any) -> Staged:
    """Writes a checkpoint below an exchange folder; returns what a rank says of it."""
    target = folder / TRAINER / f"checkpoint-{step}"
    for name in FILES:
        if name != leave_out:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(f"{name} of step {step}".encode() * 1000)
    return Staged(step, str(target), epoch=0.5, tokens=step * 10, world_size=1, threads=1, **facts)


def stage(folder: Path, step: int) -> Staged:
    """The same, handed over to the guard."""
    staged = make_checkpoint(folder, step)
    write_json(staged_path(folder, step), staged)
    return staged
