"""Checkpoints of one rank: copied at a step boundary, written behind training, handed to the guard.

save ─▶ snapshot in memory (training waits) ─▶ files (a thread) ─▶ staged/<step>-<rank>.json (the guard's)
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spotune.core.failpoints import failpoint
from spotune.core.protocol import EventLog, Staged, staged_path, write_json
from spotune.sft.finite import Finite
from spotune.sft.preflight import NotFinite
from spotune.sft.snapshot import Arena, Capture, Writer, capturing, size_of

REMEDY = "lower learning_rate, raise warmup_steps, or use bf16 in place of fp16"


class Saver:
    """Saves one checkpoint at a time.

    Args:
        folder: the exchange folder.
        events: rank 0's log, None on the others.
        versions: of the libraries, for the commit.

    Attributes:
        finite: keeps weights that are not finite out of checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        events: EventLog | None,
        versions: dict[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.events, self.versions = folder, events, versions
        self.saved_step = -1
        self.finite = Finite()
        self._kept_step = 0  # of the newest checkpoint that is whole
        self._clock = clock
        # The commit has a sha256 of each file: a checksum of each tensor in it costs a tenth of a save, for nothing.
        torch.serialization.set_crc32_options(False)
        self._arena = Arena()
        self._writer = Writer()
        self._writing: Path | None = None
        self._group: Any = None

    @property
    def busy(self) -> bool:
        """Whether the last checkpoint is still on its way to the disk."""
        return self._writer.busy

    def prepare(self, trainer: Any) -> None:
        """Makes what a save needs, behind training; to be called by all ranks once the optimizer has its state."""
        if trainer.is_fsdp_enabled:
            # Writers of sharded checkpoints talk to each other beside training, so not by its group.
            self._group = torch.distributed.new_group(backend="gloo")
        elif trainer.args.process_index == 0 and not trainer.is_deepspeed_enabled:
            self._arena.warm(size_of(_what_is_saved(trainer)))

    def begin(self, trainer: Any) -> None:
        """Looks at the weights before the first step: those of the model, or of the restored checkpoint."""
        self.require_finite(trainer)
        self._kept_step = trainer.state.global_step

    def require_finite(self, trainer: Any, with_optimizer: bool = False) -> None:
        """Raises NotFinite on all ranks where any rank's part of what is trained is not finite."""
        fault = self.finite.fault(trainer, with_optimizer)
        if not fault:
            return
        self.settle()  # the checkpoint that is being written is of an earlier step, and finite
        kept = (
            f"the last finite checkpoint is of step {self._kept_step}" if self._kept_step else "no checkpoint is kept"
        )
        raise NotFinite(f"{fault}; {kept} ({REMEDY})")

    def save(self, trainer: Any, checkpoint: Path, write: Callable[[], None]) -> None:
        """Copies what ``write`` writes to ``checkpoint``; returns when training may go on.

        Waits for the checkpoint before it, if that is not on the disk yet. Raises NotFinite, and saves nothing, where
        training cannot go on from here.
        """
        began = self._clock()
        self.settle()
        step = trainer.state.global_step
        self.require_finite(trainer, with_optimizer=step < trainer.state.max_steps)
        self._arena.reset()
        capture = Capture(self._arena, self._group)
        try:
            with capturing(capture, trainer.processing_class):
                write()
            trainer.extra().write(checkpoint, trainer.args.process_index)
        except OSError as fault:
            if trainer.args.world_size > 1:  # the other ranks may wait for this one by now
                raise
            self._give_up(checkpoint, fault)
            return
        self.saved_step, self._writing = step, checkpoint
        staged = self._staged(trainer, checkpoint)
        if self.events:
            self.events.write("save", step=step, stall_s=round(self._clock() - began, 4))
        failpoint("snapshot")
        self._writer.submit(capture.pieces, partial(self._hand_over, staged, trainer.args.process_index))

    def settle(self) -> None:
        """Waits for the checkpoint that is being written; says so when the disk did not take it."""
        fault = self._writer.settle()
        if fault is not None and self._writing is not None:
            self._give_up(self._writing, fault)

    def _staged(self, trainer: Any, checkpoint: Path) -> Staged:
        args, state = trainer.args, trainer.state
        return Staged(
            step=state.global_step,
            checkpoint=str(checkpoint),
            epoch=float(state.epoch or 0.0),
            tokens=int(trainer._total_train_tokens),
            world_size=args.world_size,
            threads=torch.get_num_threads(),
            best_step=state.best_global_step if args.load_best_model_at_end else None,
            versions=self.versions,
            global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )

    def _hand_over(self, staged: Staged, rank: int, facts: dict[Path, dict[str, Any]], write_s: float) -> None:
        """The writer's last act: from now on the guard may take the checkpoint."""
        failpoint("written")
        files = {path.relative_to(staged.checkpoint).as_posix(): fact for path, fact in facts.items()}
        if self.events:
            size = sum(int(fact["size"]) for fact in files.values())
            self.events.write("written", step=staged.step, write_s=round(write_s, 4), bytes=size)
        write_json(staged_path(self.folder, staged.step, rank), replace(staged, files=files))
        self._kept_step = staged.step

    def _give_up(self, checkpoint: Path, fault: OSError) -> None:
        """A checkpoint did not come about; training goes on, and the next save tries again."""
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.saved_step, self._writing = -1, None
        step = int(checkpoint.name.rpartition("-")[2])
        print(f"[spotune] step {step} is not saved: {fault}", file=sys.stderr, flush=True)
        if self.events:
            self.events.write("unsaved", step=step, message=str(fault))


def _what_is_saved(trainer: Any) -> list[torch.Tensor]:
    """The tensors that make up the size of a checkpoint: of an adapter only what is trained."""
    model = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = trained if hasattr(model, "peft_config") else list(model.state_dict().values())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [*weights, *(value for value in states if isinstance(value, torch.Tensor))]
