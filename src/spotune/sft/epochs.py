"""One trainer's epochs: where in the data a run goes on, and where it is. See ``position.py``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from spotune.contracts.errors import InputError
from spotune.sft.position import Layout, Position, Start, length, made_by, place


class Epochs:
    """Keeps the place in the data of one rank's trainer.

    Where nothing has changed the place is the one that Trainer counts itself, and nothing here interferes.

    Attributes:
        epoch: that is under way, from 0.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._layout: Layout | None = None
        self._start: Start | None = None  # how the resumed epoch goes on, where Trainer's own count is another place
        self._stream_steps: int | None = None
        self.epoch = self._step_before = self._steps = self._offset = 0

    @property
    def steps(self) -> int:
        """Steps of the epoch so far; rows that were trained in other batches count as steps of today's."""
        return int(self._trainer.state.global_step) - self._step_before

    def plan(self, values: tuple[Any, ...], loader: Any) -> tuple[Any, ...]:
        """Takes and returns what Trainer makes of the length of its data; raises InputError for a place that is gone.

        What is changed: how many epochs there are, and how many steps.
        """
        self._start = self._stream_steps = None
        trainer = self._trainer
        try:
            self._layout = None if trainer.is_streaming else Layout(loader)
        except TypeError:
            self._layout = None
        before = self._before()
        if before is None or trainer.args.ignore_data_skip:
            return values
        now = self._now()
        epoch, row = place(before, now, trainer.boundary.where)
        if trainer.is_streaming:
            self._stream_steps = self._steps_of_stream(before, now)
        elif self._layout is not None:
            epochs, steps, *rest, max_steps = values
            done = trainer.boundary.resumed_step
            usual_epoch, usual_steps = divmod(done, steps)
            if (epoch, row) != (usual_epoch, usual_steps * now.step_rows):
                start = self._start = self._layout.start(epoch, row, trainer.args.gradient_accumulation_steps)
                max_steps, epochs = length(start, done, steps, trainer.args.max_steps, trainer.args.num_train_epochs)
                epoch, row = start.epoch, start.row
            values = (epochs, steps, *rest, max_steps)
        self._tell(before, Position(epoch, row, now.rows), now)
        return values

    def first(self, found: tuple[int, int]) -> tuple[int, int]:
        """Returns (epoch, batches of it to skip) to go on with; ``found``: what Trainer has counted."""
        restored, accumulation = self._trainer.boundary.restored, self._trainer.args.gradient_accumulation_steps
        if self._start is not None:
            return self._start.epoch, self._start.skipped
        if self._trainer.is_streaming and restored is not None:  # Trainer takes a stream's first epoch for endless
            steps = restored.epoch_steps if self._stream_steps is None else self._stream_steps
            return restored.epoch, steps * accumulation
        return found

    @contextmanager
    def running(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """While an epoch runs; ``kwargs`` are those of Trainer's ``_run_epoch``, changed in place."""
        is_resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        start, layout, trainer = self._start if is_resumed else None, self._layout, self._trainer
        if start is not None:
            kwargs |= {"steps_in_epoch": start.batches, "num_update_steps_per_epoch": start.steps}
            kwargs["steps_trained_in_current_epoch"] = start.skipped
        skipped = kwargs["steps_trained_in_current_epoch"] if is_resumed else 0
        self.epoch, self._steps = kwargs["epoch"], kwargs["num_update_steps_per_epoch"]
        self._step_before = trainer.state.global_step - skipped // trainer.args.gradient_accumulation_steps
        self._offset = start.row - start.skipped * layout.batch_rows if start and layout else 0
        with layout.rows_from(start.row, start.skipped) if start and layout else nullcontext():
            yield

    def position(self) -> Position:
        """Returns where the run is; at an epoch's end that is the next one's beginning."""
        now, is_streaming = self._now(), self._trainer.is_streaming
        row = self._offset + self.steps * now.step_rows
        is_over = not is_streaming and (self.steps >= self._steps or row >= now.rows)
        epoch, row = (self.epoch + 1, 0) if is_over else (self.epoch, row)
        return Position(epoch, row, now.rows, now.step_rows, now.made_by)

    def _before(self) -> Position | None:
        """The place that the checkpoint names. One of an earlier version names it in steps, of so many rows as its
        commit says."""
        boundary = self._trainer.boundary
        if boundary.restored is None:
            return None
        if boundary.restored.position:
            return Position(**boundary.restored.position)
        rows, now = boundary.resumed_step_rows, self._now()
        if not rows or rows == now.step_rows:
            return None
        return Position(boundary.restored.epoch, boundary.restored.epoch_steps * rows, step_rows=rows)

    def _now(self) -> Position:
        args = self._trainer.args
        rows = 0 if self._trainer.is_streaming else len(self._trainer.train_dataset)
        batch = self._layout.batch_rows if self._layout else self._trainer._train_batch_size * args.world_size
        return Position(0, 0, rows, batch * args.gradient_accumulation_steps, made_by(args))

    def _steps_of_stream(self, before: Position, now: Position) -> int:
        """A stream is read again from its beginning, in whole steps."""
        steps, rest = divmod(before.row, now.step_rows)
        if rest:
            what = f"the run is at {before} of a stream, which steps of {now.step_rows} rows do not come to"
            remedy = f"a batch and an accumulation whose product divides {before.row}"
            raise InputError(self._trainer.boundary.where, what, key="per_device_train_batch_size", remedy=remedy)
        return steps

    def _tell(self, before: Position, after: Position, now: Position) -> None:
        """One line, where batches or rows are made in another way than before."""
        is_same = (before.rows, before.step_rows, before.made_by) == (now.rows, now.step_rows, now.made_by)
        if is_same or self._trainer.args.process_index != 0:
            return
        steps = f", in steps of {now.step_rows} rows" if before.step_rows != now.step_rows else ""
        steps += f" instead of {before.step_rows}" if steps and before.step_rows else ""
        print(f"[spotune] goes on in {after} (before: {before}){steps}", file=sys.stderr)
