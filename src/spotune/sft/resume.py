"""A restored checkpoint, made ready for Trainer: complete, and with paths of this machine in it."""

import json
import os
from pathlib import Path
from typing import Any

from spotune.contracts.errors import SpotuneError
from spotune.sft.extra import Extra

STATE = "trainer_state.json"


def prepare(trainer: Any, restored: dict[str, Any]) -> str | None:
    """What to give to ``trainer.train``; None for a fresh start."""
    if not restored.get("checkpoint"):
        return None
    checkpoint = Path(restored["checkpoint"])
    args, boundary = trainer.args, trainer.boundary
    if trainer.is_fsdp_enabled:
        from spotune.sft.shards import refuse_code  # here: torch's sharding is loaded where it is used

        refuse_code()
    if trainer.is_deepspeed_enabled:
        from spotune.sft import deepspeed_files

        deepspeed_files.refuse_code()
    _check_complete(checkpoint, trainer)
    if args.local_process_index == 0:
        _patch_best(checkpoint, restored.get("best_checkpoint"))
    boundary.resumed_from = checkpoint
    boundary.restored = Extra.read(checkpoint, args.process_index, args.world_size, int(restored.get("tokens") or 0))
    boundary.resumed_step = json.loads((checkpoint / STATE).read_bytes())["global_step"]
    boundary.resumed_step_rows = int(restored.get("global_batch") or 0)
    args.eval_on_start = False  # it was done before the first step
    if args.world_size > 1:
        import torch

        torch.distributed.barrier()
    return str(checkpoint)


def _check_complete(checkpoint: Path, trainer: Any) -> None:
    """Trainer takes a missing optimizer or RNG for a wish to start these afresh, without a word."""
    needed = [STATE]
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        needed += ["optimizer.pt", "scheduler.pt"]
    missing = [name for name in needed if not (checkpoint / name).exists()]
    if missing or not list(checkpoint.glob("rng_state*.pth")):
        raise SpotuneError(f"{checkpoint.name}: not a whole checkpoint, {', '.join(missing) or 'rng_state'} is missing")


def _patch_best(checkpoint: Path, best_checkpoint: str | None) -> None:
    """Puts this machine's path of the best checkpoint into the state; by rename, since files may be hard links."""
    state = json.loads((checkpoint / STATE).read_bytes())
    if state.get("best_global_step") == state.get("global_step"):
        best_checkpoint = str(checkpoint)
    if state.get("best_model_checkpoint") == best_checkpoint:
        return
    state["best_model_checkpoint"] = best_checkpoint
    part = checkpoint / f".{STATE}.part"
    part.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    os.replace(part, checkpoint / STATE)
