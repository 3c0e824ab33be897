"""A step's end: the decisions (stop, save), made common to all ranks, and what an exact resume needs."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from spotune.core.protocol import EventLog, Phase, read_json, write_json
from spotune.sft.arguments import SaveRule
from spotune.sft.control import Control, Wish
from spotune.sft.preflight import Stopped
from spotune.sft.saver import Saver

# What a checkpoint needs beyond Trainer's own files for an exact resume: ``spotune.json``, one per rank.
#
# Trainer forgets, on resume: the tokens seen, the losses and metrics gathered since the last log line, and
# an evaluation that was due when the machine was taken. Floats survive JSON bit for bit.

_COMMON = ("evaluation_owed", "epoch", "epoch_steps", "position")  # the same on all ranks, however many there are


@dataclass
class Extra:
    """The state of one rank beside Trainer's.

    Attributes:
        tokens: non-padding tokens trained since step 0, all ranks.
        evaluation_owed: an evaluation was due at this step and has not run.
        epoch, epoch_steps: where a stream is: its epoch, and the steps of that epoch so far.
        position: where the run is in its data, in rows (``Position``); empty in checkpoints of earlier versions.
        loss_sum: loss since the last log line; ``loss_total``: of all lines before; ``logged_step``: their last step.
        metrics: TRL's lists of values since the last log line.
    """

    tokens: int = 0
    evaluation_owed: bool = False
    epoch: int = 0
    epoch_steps: int = 0
    position: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_total: float = 0.0
    logged_step: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def write(self, checkpoint: Path, rank: int) -> None:
        write_json(checkpoint / file_name(rank), asdict(self))

    @classmethod
    def read(cls, checkpoint: Path, rank: int, world_size: int, tokens: int) -> "Extra | None":
        """What was written; with other ranks only what is common to all, None for a checkpoint made elsewhere."""
        found: dict[str, Any] | None = read_json(checkpoint / file_name(rank))
        lead = read_json(checkpoint / file_name(0))
        ranks = len(list(checkpoint.glob("spotune*.json")))
        if found is None or ranks != world_size:
            step = int((read_json(checkpoint / "trainer_state.json") or {}).get("global_step", 0))
            common = {name: lead[name] for name in _COMMON if name in lead} if lead else {}
            return cls(tokens=tokens, logged_step=step, **common) if tokens or lead else None
        return cls(**found)


def file_name(rank: int) -> str:
    return "spotune.json" if rank == 0 else f"spotune_{rank}.json"


# What happens on a step's end: the decisions (stop, save), made common to all ranks, and the events.
#
# Trainer's flags in ``control`` are the means: DefaultFlowCallback has set them as the config says, this
# callback comes after it and has the last word.

PREDICTED_S = 2.0  # an evaluation says that it has come on, at most so often


class EvaluationInterrupted(Exception):
    """The guard asked to leave while an evaluation ran; it is to be run again after the restore."""


class Boundary(TrainerCallback):
    """Keeps the boundaries of one rank's training.

    Args:
        rule: when to save.
        saver: of the same rank.
        clock: seconds, for ``rule``.

    Attributes:
        resumed_from: the restored checkpoint, None for a fresh start.
        restored: this rank's state that came with it.
        resumed_step, resumed_step_rows: its step, and how many rows a step had according to its commit, 0: not known.
        where: the config's path, for messages.
    """

    def __init__(self, rule: SaveRule, saver: Saver, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule = rule
        self.saver = saver
        self.events: EventLog | None = saver.events
        self.control_file = Control(saver.folder)
        self.trainer: Any = None
        self.resumed_from: Path | None = None
        self.restored: Extra | None = None
        self.resumed_step = self.resumed_step_rows = 0
        self.where = "config"
        self.leaving = False
        self.evaluation_owed = False
        self._clock = clock
        self._last_save = clock()
        self._phase: Phase = "load"
        self._predicted_at = -PREDICTED_S
        self._data_wait_s = 0.0
        self._is_saving_due = False
        self._first_step = 0

    # -- Trainer's events -------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        if self.restored is not None:
            self.trainer.restore_extra(self.restored)
        if self.events:
            trainable, total = (get_model_param_count(model, trainable_only=only) for only in (True, False))
            self.events.write("plan", max_steps=state.max_steps, num_train_epochs=state.num_train_epochs,
                              trainable_parameters=trainable, total_parameters=total)  # fmt: skip
        self._enter("train")
        self._first_step = state.global_step + 1
        self.saver.begin(self.trainer)
        self._last_save = self._clock()
        if self._common(self.control_file.look()).stop:
            raise Stopped(state.global_step)
        if self.restored is not None and self.restored.evaluation_owed:
            try:
                self.trainer.evaluate_owed()
            except EvaluationInterrupted as interruption:
                raise Stopped(state.global_step) from interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.events:
            tokens = int(self.trainer._total_train_tokens)
            self.events.write("step", step=state.global_step, tokens=tokens, data_wait_s=round(self._data_wait_s, 6))
        self._data_wait_s = 0.0
        self.evaluation_owed = False
        self.saver.finite.end_step(state.global_step, self.trainer.accelerator.optimizer_step_was_skipped)
        if state.global_step == self._first_step:
            self.saver.require_finite(self.trainer)  # a learning rate that is far too high is found here
            self.saver.prepare(self.trainer)
        self._is_saving_due |= self._is_due(state.global_step, control.should_save)
        if control.should_training_stop or (state.epoch == int(state.epoch) and not self.trainer.is_streaming):
            control.should_save = False  # the epoch's end follows at once and is this step's boundary
        else:
            self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and self.rule.as_config:
            self._is_saving_due = True
        if self.trainer.is_streaming and not control.should_training_stop:
            control.should_save = False  # batches of a step that goes on in the next epoch may be under way
        else:
            self._decide(state, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.events and self._clock() - self._predicted_at >= PREDICTED_S:
            self._predicted_at = self._clock()
            self.events.write("predicted", step=state.global_step)
        if self.trainer.is_in_train and self._common(self.control_file.look()).stop:
            self.leaving = True
            raise EvaluationInterrupted

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if _is_number(value)}
        if self.events:
            self.events.write("log", **{**numbers, "step": state.global_step, "epoch": state.epoch})
        if "loss" in numbers and not math.isfinite(numbers["loss"]):  # the same on all ranks
            self.trainer._tr_loss.zero_()  # Trainer subtracts the sum from itself: NaN stays NaN
            self.saver.require_finite(self.trainer)

    # -- decisions --------------------------------------------------------------------------------------------------

    def _is_due(self, step: int, as_config: bool) -> bool:
        if self.rule.as_config:
            return as_config
        by_steps = self.rule.steps is not None and step % self.rule.steps == 0
        by_time = self.rule.seconds is not None and self._clock() - self._last_save >= self.rule.seconds
        return by_steps or (by_time and self.trainer.args.process_index == 0)  # rank 0's clock, made common below

    def _decide(self, state: Any, control: Any) -> None:
        is_last = state.global_step >= state.max_steps
        seen = self.control_file.look()
        if not self.saver.busy:
            self.saver.settle()
        wish = self._common(Wish(seen.stop, seen.save or self._is_saving_due, busy=self.saver.busy))
        is_new = self.saver.saved_step != state.global_step
        # One snapshot at a time: a save that is due while the last one is still being written waits for its turn.
        control.should_save = ((wish.save and not wish.busy) or wish.stop or is_last) and is_new
        self._is_saving_due = wish.save and wish.busy
        if wish.stop:
            self.leaving = True
            if control.should_evaluate:  # it may outlast the grace: run after the restore instead
                self.evaluation_owed = True
                control.should_evaluate = False

    def _common(self, wish: Wish) -> Wish:
        """What any rank wants, all do; one all-reduce."""
        if self.trainer.args.world_size <= 1:
            return wish
        flags = torch.tensor([wish.stop, wish.save, wish.busy], dtype=torch.int32, device=self.trainer.args.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return Wish(*map(bool, flags.tolist()))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_save = self._clock()
        self.control_file.answered()

    def owe_evaluation(self) -> None:
        self.evaluation_owed = True

    # -- records ----------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """A phase within training; the one before goes on after it."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self.events:
            self.events.phase(phase)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time that training waits for them is added up."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._data_wait_s += time.perf_counter() - began
            yield batch


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
