"""``python -m spotune.sft.wandb_rebuild FOLDER``: FOLDER/run.json -> FOLDER/wandb/offline-run-*, one clean run."""

import json
import sys
from pathlib import Path

from spotune.core.output import protect_output
from spotune.core.protocol import NOT_FINITE


def rebuild(folder: Path) -> None:
    """Logs every surviving line once, in order, with Trainer's own names (``train/loss``, ``eval/loss``)."""
    import wandb

    spec = json.loads((folder / "run.json").read_bytes())
    run = wandb.init(
        id=spec["run_id"],
        name=spec["run_id"],
        config=spec["config"],
        dir=str(folder),
        mode="offline",
        settings=wandb.Settings(silent=True, x_disable_stats=True, x_disable_meta=True),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    for line in spec["logs"]:
        step, _ = line.pop("step"), line.pop("t", None)
        named = {_tracker_name(name): float(value) if value in NOT_FINITE else value for name, value in line.items()}
        run.log({**named, "train/global_step": step})
    run.finish()


def _tracker_name(name: str) -> str:
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


if __name__ == "__main__":
    protect_output()
    rebuild(Path(sys.argv[1]))
