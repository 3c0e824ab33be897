"""Stops and saves at a step's end, and keeps weights that are not finite out of checkpoints and results."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from spotune.core import protocol
from spotune.core.io import failpoint
from spotune.sft.preflight import NotFinite, Stopped
from spotune.sft.snapshot import Arena, Capture, Writer, capturing, size_of

# Weights that are not finite end the training. The loss and the gradient's norm of every step leave a flag on the
# device, without a wait. The weights themselves are read before training, after the first step, when a loss is logged
# as NaN or infinite, before each snapshot, and before the result: one pass over the tensors and one wait
# (benchmarks/finite.py). Only trained weights count: a buffer may hold a mask of -inf, a quantized base holds integers.

_NEVER = 2**62  # a step that never comes


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether no element is NaN or infinite. Ignores integers; waits once for each dtype.

    Reads the smallest and the largest element: NaN wins both. Unlike a sum or a norm they cannot overflow.
    """
    ends: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in _measurable(tensors):
        try:
            found = torch.aminmax(tensor)
        except NotImplementedError:  # a quantized state that looks like a tensor of floats
            found = torch.aminmax(tensor.dequantize())
        ends.setdefault((tensor.device, tensor.dtype), []).extend(found)
    return all(bool(torch.stack(found).isfinite().all()) for found in ends.values())


def _measurable(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields this rank's part of each tensor whose elements can be NaN."""
    for tensor in tensors:
        local = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's name for a rank's part
        local = local.to_local() if isinstance(local, DTensor) else local
        if local.layout != torch.strided or not local.numel():
            continue
        local = torch.view_as_real(local) if local.is_complex() else local
        if local.is_floating_point():
            yield local.detach().float() if local.element_size() == 1 else local.detach()


class Finite:
    """Records up to which step one rank's weights were finite."""

    def __init__(self) -> None:
        self._checked: int | None = None  # the weights were finite after this step
        self._is_bad: torch.Tensor | None = None  # within the step under way
        self._since: torch.Tensor | None = None  # the first step with a flag since ``_checked``

    def note(self, value: Any) -> None:
        """Takes a loss or a norm of the step under way. Does not wait for the device."""
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            bad = torch.isfinite(value.detach()).all().logical_not()
            self._is_bad = bad if self._is_bad is None else self._is_bad.to(bad.device) | bad
        elif isinstance(value, float) and not math.isfinite(value):
            self._is_bad = torch.tensor(True)

    def end_step(self, step: int, was_skipped: bool) -> None:
        """Keeps the step's flag. A step that the gradient scaler skipped changed no weights."""
        bad, self._is_bad = self._is_bad, None
        if bad is None or was_skipped:
            return
        since = torch.full((), _NEVER, device=bad.device) if self._since is None else self._since.to(bad.device)
        self._since = torch.where(bad & (since == _NEVER), step, since)

    def fault(self, trainer: Any, with_optimizer: bool = False) -> str:
        """Returns what is not finite and since when, else "". All ranks call it and get the same answer."""
        step = int(trainer.state.global_step)
        tensors = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        is_finite = all_finite(tensors)
        since = _NEVER if self._since is None else int(self._since)
        # Only a step whose gradient was not finite can spoil a state, so the state is rarely read.
        is_suspect = with_optimizer and is_finite and since != _NEVER
        is_state_finite = not is_suspect or all_finite(_optimizer_state(trainer))
        # A fault of one rank is a fault of all, and the earliest step counts.
        found = _reduced(trainer, (is_finite, is_state_finite, since), torch.distributed.ReduceOp.MIN)
        is_finite, is_state_finite, since = found
        if is_finite and is_state_finite:
            self._checked, self._since = step, None
            return ""
        return f"{'the optimizer state is' if is_finite else 'the weights are'} not finite {self._when(step, since)}"

    def _when(self, step: int, since: int) -> str:
        if self._checked is None:
            return f"in the checkpoint of step {step}" if step else "in the model, before the first step"
        if since <= step:
            return f"since step {since}"
        if self._checked >= step - 1:
            return f"since step {step}"
        return f"since step {step} or one before it (after step {self._checked} they were)"


def _optimizer_state(trainer: Any) -> Iterator[torch.Tensor]:
    for state in getattr(trainer.optimizer, "state", {}).values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _reduced(trainer: Any, values: Iterable[int], operation: Any) -> list[int]:
    """Returns the values of all ranks, reduced; one all-reduce."""
    if trainer.args.world_size <= 1:
        return list(values)
    found = torch.tensor([int(value) for value in values], device=trainer.args.device)
    torch.distributed.all_reduce(found, op=operation)
    return found.tolist()


class Saver:
    """Saves one checkpoint at a time, none with weights that are not finite.

        save ─▶ snapshot in memory (training waits) ─▶ files (threads) ─▶ staged/<step>-<rank>.json (for the guard)

    ``folder`` is the exchange folder, ``events`` rank 0's log (else None), ``versions`` the libraries', for the commit.
    """

    def __init__(self, folder: Path, events: protocol.EventLog | None, versions: dict[str, str]) -> None:
        self.folder, self.events, self.versions = folder, events, versions
        self.saved_step = -1
        self.finite = Finite()
        self.kept_step = 0  # the step of the newest whole checkpoint
        # The commit has each file's sha256. A checksum of each tensor would cost a tenth of a save and add nothing.
        torch.serialization.set_crc32_options(False)
        self._arena = Arena()
        self.writer = Writer()
        self._writing = self._group = None  # the checkpoint's folder, and a process group

    def prepare(self, trainer: Any) -> None:
        """Prepares what a save needs, behind training. All ranks call it once the optimizer has its state."""
        if trainer.is_fsdp_enabled:
            # Writers of sharded checkpoints talk to each other beside training, so they need their own group.
            self._group = torch.distributed.new_group(backend="gloo")
        elif trainer.args.process_index == 0 and not trainer.is_deepspeed_enabled:
            model = trainer.model  # an adapter's checkpoint holds only what is trained
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            weights = trained if hasattr(model, "peft_config") else list(model.state_dict().values())
            self._arena.warm(size_of([*weights, *_optimizer_state(trainer)]))

    def require_finite(self, trainer: Any, with_optimizer: bool = False) -> None:
        """Raises NotFinite on all ranks if any rank's part of the trained weights is not finite."""
        fault = self.finite.fault(trainer, with_optimizer)
        if not fault:
            return
        self.settle()  # the checkpoint that is being written is of an earlier step, and finite
        kept = f"the last finite checkpoint is of step {self.kept_step}" if self.kept_step else "no checkpoint is kept"
        raise NotFinite(f"{fault}; {kept} (lower learning_rate, raise warmup_steps, or use bf16 in place of fp16)")

    def save(self, trainer: Any, checkpoint: Path, write: Callable[[], None]) -> None:
        """Copies what ``write`` writes to ``checkpoint``; returns when training may go on.

        Waits for the last checkpoint if that is not on the disk yet. Raises NotFinite, and saves nothing, if training
        cannot go on from here.
        """
        began = time.monotonic()
        self.settle()
        args, state = trainer.args, trainer.state
        step, rank = state.global_step, args.process_index
        self.require_finite(trainer, with_optimizer=step < state.max_steps)
        self._arena.reset()
        capture = Capture(self._arena, self._group)
        try:
            with capturing(capture, trainer.processing_class):
                write()
            trainer.extra().write(checkpoint, rank)
        except OSError as fault:
            if args.world_size > 1:  # the other ranks may wait for this one by now
                raise
            self._give_up(checkpoint, fault)
            return
        self.saved_step, self._writing = step, checkpoint
        staged = protocol.Staged(
            step=step,
            checkpoint=str(checkpoint),
            epoch=float(state.epoch or 0.0),
            tokens=int(trainer._total_train_tokens),
            world_size=args.world_size,
            threads=torch.get_num_threads(),
            best_step=state.best_global_step if args.load_best_model_at_end else None,
            versions=self.versions,
            global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        if self.events:
            self.events.write("save", step=step, stall_s=round(time.monotonic() - began, 4))
        failpoint("snapshot")
        self.writer.submit(capture.pieces, partial(self._hand_over, staged, rank))

    def settle(self) -> None:
        """Waits for the checkpoint that is being written. Logs a fault of the disk."""
        fault = self.writer.settle()
        if fault is not None and self._writing is not None:
            self._give_up(self._writing, fault)

    def _hand_over(self, staged: protocol.Staged, rank: int, facts: dict[Path, dict[str, Any]], write_s: float) -> None:
        """Stages a written checkpoint: from now on the guard may take it."""
        failpoint("written")
        files = {path.relative_to(staged.checkpoint).as_posix(): fact for path, fact in facts.items()}
        if self.events:
            size = sum(int(fact["size"]) for fact in files.values())
            self.events.write("written", step=staged.step, write_s=round(write_s, 4), bytes=size)
        protocol.write_json(protocol.staged_path(self.folder, staged.step, rank), replace(staged, files=files))
        self.kept_step = staged.step

    def _give_up(self, checkpoint: Path, fault: OSError) -> None:
        """Removes a checkpoint that failed. Training goes on, and the next save tries again."""
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.saved_step, self._writing = -1, None
        step = int(checkpoint.name.rpartition("-")[2])
        print(f"[spotune] step {step} is not saved: {fault}", file=sys.stderr, flush=True)
        if self.events:
            self.events.write("unsaved", step=step, message=str(fault))


# ``spotune.json``, one per rank: what an exact resume needs beside Trainer's own files. On resume, Trainer forgets the
# tokens seen, the losses and metrics since the last log line, and an evaluation that was due when the machine was
# preempted. Floats survive JSON bit for bit.

_COMMON = ("evaluation_owed", "epoch", "epoch_steps", "position")  # the same on all ranks, however many there are


@dataclass
class Extra:
    """The state of one rank beside Trainer's."""

    tokens: int = 0  # non-padding ones trained since step 0, all ranks
    evaluation_owed: bool = False  # an evaluation was due at this step and has not run
    epoch: int = 0  # of a stream
    epoch_steps: int = 0  # of a stream: its steps of that epoch so far
    position: dict[str, Any] = field(default_factory=dict)  # a ``Position``; empty in earlier versions' checkpoints
    loss_sum: float = 0.0  # since the last log line
    loss_total: float = 0.0  # before the last log line
    logged_step: int = 0  # of the last log line
    metrics: dict[str, list[float]] = field(default_factory=dict)  # TRL's lists of values since the last log line

    def write(self, checkpoint: Path, rank: int) -> None:
        protocol.write_json(checkpoint / file_name(rank), asdict(self))

    @classmethod
    def read(cls, checkpoint: Path, rank: int, world_size: int, tokens: int) -> "Extra | None":
        """Returns what ``write`` wrote, under another number of ranks what all share; None if spotune wrote nothing."""
        found: dict[str, Any] | None = protocol.read_json(checkpoint / file_name(rank))
        lead = protocol.read_json(checkpoint / file_name(0))
        ranks = len(list(checkpoint.glob("spotune*.json")))
        if found is None or ranks != world_size:
            step = int((protocol.read_json(checkpoint / "trainer_state.json") or {}).get("global_step", 0))
            common = {name: lead[name] for name in _COMMON if name in lead} if lead else {}
            return cls(tokens=tokens, logged_step=step, **common) if tokens or lead else None
        return cls(**found)


def file_name(rank: int) -> str:
    return "spotune.json" if rank == 0 else f"spotune_{rank}.json"


class EvaluationInterrupted(Exception):
    """The guard asked to stop while an evaluation ran. The evaluation runs again after the restore."""


class Boundary(TrainerCallback):
    """Decides at each step's end whether to stop and whether to save, the same on all ranks.

    DefaultFlowCallback sets Trainer's flags in ``control`` as the config says; this callback comes after it.
    """

    def __init__(self, job: protocol.WorkerJob, saver: Saver) -> None:
        self.job = job
        self.saver = saver
        self.events: protocol.EventLog | None = saver.events
        self.control_file = protocol.Control(saver.folder)
        self.trainer: Any = None
        self.resumed_from: Path | None = None  # the restored checkpoint; None for a fresh start
        self.restored: Extra | None = None  # this rank's state in that checkpoint
        self.resumed_step = self.resumed_step_rows = 0  # its step, and its commit's rows of a step; 0: unknown
        self.leaving = self.evaluation_owed = self._is_saving_due = False  # leaving: the guard asked to stop
        self._last_save = time.monotonic()
        self._phase: protocol.Phase = "load"
        self._predicted_at = -math.inf
        self._data_wait_s = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.restored is not None:
            self.trainer.restore_extra(self.restored)
        if self.events:
            model = self.trainer.model
            trainable, total = (get_model_param_count(model, trainable_only=only) for only in (True, False))
            self.events.write("plan", max_steps=state.max_steps, num_train_epochs=state.num_train_epochs,
                              trainable_parameters=trainable, total_parameters=total)  # fmt: skip
        self._enter("train")
        self._first_step = state.global_step + 1
        self.saver.require_finite(self.trainer)
        self.saver.kept_step = state.global_step
        self._last_save = time.monotonic()
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
            self.saver.require_finite(self.trainer)  # finds a learning rate that is far too high
            self.saver.prepare(self.trainer)
        job = self.job
        by_steps = job.save_steps is not None and state.global_step % job.save_steps == 0
        by_time = job.save_seconds is not None and time.monotonic() - self._last_save >= job.save_seconds
        is_due = by_steps or (by_time and args.process_index == 0)  # rank 0's clock counts for all ranks
        self._is_saving_due |= control.should_save if job.save_as_config else is_due
        if control.should_training_stop or (state.epoch == int(state.epoch) and not self.trainer.is_streaming):
            control.should_save = False  # the epoch's end follows at once and decides for this step
        else:
            self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and self.job.save_as_config:
            self._is_saving_due = True
        if self.trainer.is_streaming and not control.should_training_stop:
            control.should_save = False  # a step that goes on in the next epoch may have used batches already
        else:
            self._decide(state, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.events and time.monotonic() - self._predicted_at >= 2.0:  # seconds
            self._predicted_at = time.monotonic()
            self.events.write("predicted", step=state.global_step)
        if self.trainer.is_in_train and self._common(self.control_file.look()).stop:
            self.leaving = True
            raise EvaluationInterrupted

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        numbers = {name: value for name, value in numbers.items() if not isinstance(value, bool)}
        if self.events:
            self.events.write("log", **{**numbers, "step": state.global_step, "epoch": state.epoch})
        if "loss" in numbers and not math.isfinite(numbers["loss"]):  # the same on all ranks
            self.trainer._tr_loss.zero_()  # Trainer subtracts the sum from itself: NaN stays NaN
            self.saver.require_finite(self.trainer)

    def _decide(self, state: Any, control: Any) -> None:
        is_last = state.global_step >= state.max_steps
        seen = self.control_file.look()
        if not self.saver.writer.busy:
            self.saver.settle()
        asked = self._common(
            protocol.ControlState(seen.stop, seen.save or self._is_saving_due, busy=self.saver.writer.busy)
        )
        is_new = self.saver.saved_step != state.global_step
        # One snapshot at a time: a save that is due while the last one is being written waits.
        control.should_save = ((asked.save and not asked.busy) or asked.stop or is_last) and is_new
        self._is_saving_due = asked.save and asked.busy
        if asked.stop:
            self.leaving = True
            if control.should_evaluate:  # it may outlast the grace, so it runs after the restore
                self.evaluation_owed = True
                control.should_evaluate = False

    def _common(self, asked: protocol.ControlState) -> protocol.ControlState:
        """Returns what at least one rank asks for, so that all ranks do it."""
        flags = (asked.stop, asked.save, asked.busy)
        return protocol.ControlState(*map(bool, _reduced(self.trainer, flags, torch.distributed.ReduceOp.MAX)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_save = time.monotonic()
        self.control_file.answered()

    @contextmanager
    def phase(self, phase: protocol.Phase) -> Iterator[None]:
        """Marks a phase within training; afterwards the phase before it goes on."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: protocol.Phase) -> None:
        self._phase = phase
        if self.events:
            self.events.phase(phase)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields the same batches and adds up the time that training waits for them."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._data_wait_s += time.perf_counter() - began
            yield batch
