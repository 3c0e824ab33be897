"""The place in the data, in rows of an epoch, so that a run goes on there when its batches have another size.

Trainer counts in batches: under another batch size, accumulation or ``drop_last`` the same number of batches is another
row. The order of an epoch's rows depends on the seed and on how many rows there are, not on batches. So a checkpoint
says how many rows of its epoch are trained, and the epoch goes on with the row after these, in batches of today's size.
Its steps are counted as if the rows before had come in such batches too.

Where other rows are made of the same text (packing), there is no such place, and the run is refused.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler

from spotune.contracts.errors import InputError

REMEDY = "change it where an epoch ends, or start a run of its own with another --name"


@dataclass(frozen=True)
class Position:
    """Where a checkpoint is in the data.

    Attributes:
        epoch: that is under way, from 0.
        row: how many rows of it are trained, in the order of that epoch.
        rows: of an epoch; 0 for a stream, or where it is not known.
        step_rows: rows of a step, over all ranks.
        made_by: settings that decide what a row is, and in which order they come.
    """

    epoch: int
    row: int
    rows: int = 0
    step_rows: int = 0
    made_by: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.rows:
            return f"epoch {self.epoch + 1}, row {self.row}"
        return f"epoch {self.epoch + self.row / self.rows:.2f}, row {self.row} of {self.rows}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Start:
    """How an epoch goes on from a row.

    Attributes:
        skipped, skipped_steps: batches, and whole steps, that the rows before count as.
        batches, steps: of the epoch, with those.
    """

    epoch: int
    row: int
    skipped: int
    skipped_steps: int
    batches: int
    steps: int


class Layout:
    """How a prepared loader makes batches of rows.

    Raises TypeError for batches that are made in a way that is not known here.

    Attributes:
        batch_rows: rows of a batch, over all ranks.
    """

    def __init__(self, loader: Any) -> None:
        outer = getattr(loader, "batch_sampler", None)
        found = outer
        while hasattr(found, "batch_sampler"):
            found = found.batch_sampler
        is_known = type(found) is BatchSampler and not isinstance(loader, DataLoaderDispatcher)
        if not is_known or not found.batch_size:
            raise TypeError("batches of unknown making")
        is_split = found is outer or getattr(outer, "split_batches", False)
        self.batch_rows = int(found.batch_size) * (1 if is_split else int(outer.num_processes))
        self._batches, self._loader = found, loader

    def start(self, epoch: int, row: int, accumulation: int) -> Start:
        """Returns how to go on at a row; where less than a batch is left, at the next epoch's first one."""
        skipped_steps = -(-row // (self.batch_rows * accumulation))
        skipped = skipped_steps * accumulation
        with self.rows_from(row, skipped):
            batches = len(self._loader)
        if row and batches <= skipped:
            return self.start(epoch + 1, 0, accumulation)
        return Start(epoch, row, skipped, skipped_steps, batches, max(1, -(-batches // accumulation)))

    @contextmanager
    def rows_from(self, row: int, skipped: int) -> Iterator[None]:
        """While this lasts, an epoch is as many batches to skip, then the rows from ``row`` on."""
        before = self._batches.sampler
        self._batches.sampler = _RowsFrom(before, row, skipped * self.batch_rows)
        try:
            yield
        finally:
            self._batches.sampler = before


class _RowsFrom:
    """A sampler's rows from one on, behind others that are only there to be skipped."""

    def __init__(self, sampler: Any, row: int, skipped: int) -> None:
        self._sampler, self._row, self._skipped = sampler, row, skipped

    def __iter__(self) -> Iterator[int]:
        order = list(self._sampler)
        # The first rows, as ever: Accelerate fills up the last batch with them.
        yield from (order[index % len(order)] for index in range(self._skipped))
        yield from order[self._row :]

    def __len__(self) -> int:
        return self._skipped + len(self._sampler) - self._row

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


def made_by(args: Any) -> dict[str, Any]:
    """The settings of TRL's arguments that decide what a row is, and in which order rows come."""
    packing = bool(args.packing)
    return {
        "packing": packing,
        "packing_strategy": args.packing_strategy if packing else None,
        "max_length": args.max_length,
        "train_sampling_strategy": str(getattr(args, "train_sampling_strategy", "random")),
        "dataloader_drop_last": bool(args.dataloader_drop_last),
    }


def place(before: Position, now: Position, where: str) -> tuple[int, int]:
    """Returns epoch and row at which a run goes on; ``now`` says how rows and batches are made today.

    Raises InputError where the row that the run was at does not exist any more.
    """
    epoch, row = before.epoch, before.row
    if before.rows and row >= before.rows:
        epoch, row = epoch + 1, 0
    if row == 0:
        return epoch, 0
    if fault := _fault(before, now):
        key, why = fault
        raise InputError(where, f"the run is at {before}, and {why}", key=key, remedy=REMEDY)
    return (epoch + 1, 0) if now.rows and row >= now.rows else (epoch, row)


def _fault(before: Position, now: Position) -> tuple[str, str] | None:
    """The key that leaves a row in the middle of an epoch without a place, and why."""
    old, new = before.made_by, now.made_by
    changed = [key for key in new if key in old and old[key] != new[key]]
    if "packing" in changed:
        return "packing", f"packing {_words(old, new, 'packing')} makes other rows of the same text"
    for key in ("packing_strategy", "max_length"):
        if key in changed and new["packing"]:
            return key, f"{key} {_words(old, new, key)} makes other rows where packing is on"
    if "max_length" in changed and before.rows and now.rows != before.rows:
        lengths = _words(old, new, "max_length")
        return "max_length", f"max_length {lengths} leaves {now.rows} rows of {before.rows}, in another order"
    if "train_sampling_strategy" in changed:
        strategies = _words(old, new, "train_sampling_strategy")
        return "train_sampling_strategy", f"{strategies} brings its rows in another order"
    by_batch = new.get("train_sampling_strategy") not in ("random", "sequential")
    if by_batch and before.step_rows and before.step_rows != now.step_rows:
        return "train_sampling_strategy", f"under {new['train_sampling_strategy']} the order of rows follows the batch"
    return None


def _words(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> str:
    return f"{_word(old[key])} -> {_word(new[key])}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def length(start: Start, done: int, epoch_steps: int, max_steps: int, epochs: float) -> tuple[int, int]:
    """Returns the run's steps in all, and the number of the epoch that it ends with, from 1.

    Args:
        done: steps so far, whatever their size.
        epoch_steps: steps of each later epoch.
        max_steps: as the config says, 0 or less where ``epochs`` counts.
    """
    here = start.steps - start.skipped_steps
    if max_steps > 0:
        later = max(0, max_steps - done - here)
        return max_steps, start.epoch + 1 + math.ceil(later / epoch_steps)
    left = max(0, math.ceil(min(epochs - start.epoch, 1.0) * start.steps) - start.skipped_steps)
    return done + left + math.ceil(max(0.0, epochs - start.epoch - 1) * epoch_steps), math.ceil(epochs)
