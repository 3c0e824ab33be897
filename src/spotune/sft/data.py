"""Loads the rows that a run trains on, and keeps the run's place in them."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler

from spotune.core.errors import InputError
from spotune.core.fingerprint import changed_while_read, data_files, file_state, not_as_submitted, notices
from spotune.core.protocol import WorkerJob
from spotune.core.records import fingerprint
from spotune.core.store.faults import is_machine_fault
from spotune.sft.arguments import Arguments
from spotune.sft.row_counts import Origins, counts, distinct, divide, interleave, joined
from spotune.sft.sources import DataSource, dataset_of, one_layout, read_all, twins

# A run's place in its data is a row of an epoch. Trainer counts batches: under another batch size, accumulation or
# ``drop_last`` the same number of batches is another row. The order of an epoch's rows depends on the seed and the
# number of rows, not on batches. So an epoch goes on with the row after its trained ones, in batches of today's size,
# and its steps are counted as if the rows before had come in such batches too. If packing has made other rows of the
# same text there is no such place, and the run is refused.


@dataclass(frozen=True)
class Position:
    epoch: int  # the current one, from 0
    row: int  # the trained rows of that epoch, in its order
    rows: int = 0  # of an epoch; 0 for a stream, or if unknown
    step_rows: int = 0  # the rows of a step, over all ranks
    made_by: dict[str, Any] = field(default_factory=dict)  # the settings that decide what a row is, and their order

    def __str__(self) -> str:
        if not self.rows:
            return f"epoch {self.epoch + 1}, row {self.row}"
        return f"epoch {self.epoch + self.row / self.rows:.2f}, row {self.row} of {self.rows}"


@dataclass(frozen=True)
class Start:
    """Says how an epoch goes on from a row."""

    epoch: int
    row: int
    skipped: int  # the batches that the rows before count as
    skipped_steps: int
    batches: int  # of the epoch, including the skipped ones
    steps: int


class BatchLayout:
    """Says how a prepared loader makes batches of rows. Raises TypeError for an unknown kind of loader."""

    def __init__(self, loader: Any) -> None:
        outer = getattr(loader, "batch_sampler", None)
        found = outer
        while hasattr(found, "batch_sampler"):
            found = found.batch_sampler
        is_known = type(found) is BatchSampler and not isinstance(loader, DataLoaderDispatcher)
        if not is_known or not found.batch_size:
            raise TypeError("unknown kind of batches")
        is_split = found is outer or getattr(outer, "split_batches", False)
        # The rows of a batch, over all ranks.
        self.batch_rows = int(found.batch_size) * (1 if is_split else int(outer.num_processes))
        self._batches, self._loader = found, loader

    def start(self, epoch: int, row: int, accumulation: int) -> Start:
        """Returns how to go on at a row; if less than a batch is left, at the next epoch's first row."""
        skipped_steps = -(-row // (self.batch_rows * accumulation))
        skipped = skipped_steps * accumulation
        with self.rows_from(row, skipped):
            batches = len(self._loader)
        if row and batches <= skipped:
            return self.start(epoch + 1, 0, accumulation)
        return Start(epoch, row, skipped, skipped_steps, batches, max(1, -(-batches // accumulation)))

    @contextmanager
    def rows_from(self, row: int, skipped: int) -> Iterator[None]:
        """Makes an epoch of ``skipped`` batches to skip, then the rows from ``row`` on, while this lasts."""
        before = self._batches.sampler
        self._batches.sampler = _RowsFrom(before, row, skipped * self.batch_rows)
        try:
            yield
        finally:
            self._batches.sampler = before


class _RowsFrom:
    """Yields ``skipped`` rows that are only there to be skipped, then a sampler's rows from ``row`` on."""

    def __init__(self, sampler: Any, row: int, skipped: int) -> None:
        self._sampler, self._row, self._skipped = sampler, row, skipped

    def __iter__(self) -> Iterator[int]:
        order = list(self._sampler)
        # The first rows of the epoch: Accelerate fills up the last batch with them.
        yield from (order[index % len(order)] for index in range(self._skipped))
        yield from order[self._row :]

    def __len__(self) -> int:
        return self._skipped + len(self._sampler) - self._row

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


def place(before: Position, now: Position, where: str) -> tuple[int, int]:
    """Returns (epoch, row) at which a run goes on with today's rows. Raises InputError if its row no longer exists."""
    epoch, row = before.epoch, before.row
    if before.rows and row >= before.rows:
        epoch, row = epoch + 1, 0
    if row == 0:
        return epoch, 0
    if fault := _fault(before, now):
        key, why = fault
        remedy = "change it where an epoch ends, or start a run of its own with another --name"
        raise InputError(where, f"the run is at {before}, and {why}", key=key, remedy=remedy)
    return (epoch + 1, 0) if now.rows and row >= now.rows else (epoch, row)


def _fault(before: Position, now: Position) -> tuple[str, str] | None:
    """Returns the changed key that removes a row in the middle of an epoch, and why; None if no key does."""
    old, new = before.made_by, now.made_by
    changed = [key for key in new if key in old and old[key] != new[key]]

    def change(key: str) -> str:
        return " -> ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in (old[key], new[key]))

    if "packing" in changed:
        return "packing", f"packing {change('packing')} makes other rows of the same text"
    for key in ("packing_strategy", "max_length"):
        if key in changed and new["packing"]:
            return key, f"{key} {change(key)} makes other rows where packing is on"
    if "max_length" in changed and before.rows and now.rows != before.rows:
        what = f"max_length {change('max_length')} leaves {now.rows} rows of {before.rows}, in another order"
        return "max_length", what
    key = "train_sampling_strategy"
    if key in changed:
        return key, f"{change(key)} brings its rows in another order"
    by_batch = new.get(key) not in ("random", "sequential")
    if by_batch and before.step_rows and before.step_rows != now.step_rows:
        return key, f"under {new[key]} the order of rows follows the batch"
    return None


def length(start: Start, done: int, epoch_steps: int, max_steps: int, epochs: float) -> tuple[int, int]:
    """Returns the run's total steps, and the number of its last epoch, from 1.

    ``done`` are the steps so far, of any size, ``epoch_steps`` those of a later epoch. A ``max_steps`` of 0 or less
    means that ``epochs`` counts.
    """
    here = start.steps - start.skipped_steps
    if max_steps > 0:
        later = max(0, max_steps - done - here)
        return max_steps, start.epoch + 1 + math.ceil(later / epoch_steps)
    left = max(0, math.ceil(min(epochs - start.epoch, 1.0) * start.steps) - start.skipped_steps)
    return done + left + math.ceil(max(0.0, epochs - start.epoch - 1) * epoch_steps), math.ceil(epochs)


class Epochs:
    """Keeps one rank's place in the data. Leaves Trainer's own count alone if nothing has changed."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._layout: BatchLayout | None = None
        self._start: Start | None = None  # of the resumed epoch, if Trainer's own count is another place
        self._stream_steps: int | None = None
        self.epoch = self._step_before = self._steps = self._offset = 0

    @property
    def steps(self) -> int:
        """Steps of the epoch so far; rows that were trained in other batches count as steps of today's size."""
        return int(self._trainer.state.global_step) - self._step_before

    def plan(self, values: tuple[Any, ...], loader: Any) -> tuple[Any, ...]:
        """Corrects the numbers of epochs and steps that Trainer plans. Raises InputError for a place that is gone."""
        self._start = self._stream_steps = None
        trainer = self._trainer
        try:
            self._layout = None if trainer.is_streaming else BatchLayout(loader)
        except TypeError:
            self._layout = None
        before = self._before()
        if before is None or trainer.args.ignore_data_skip:
            return values
        now = self._now()
        epoch, row = place(before, now, trainer.boundary.job.config_path)
        if trainer.is_streaming:
            self._stream_steps, remainder = divmod(before.row, now.step_rows)  # of a new pass over the stream
            if remainder:
                what = f"the run is at {before} of a stream, which steps of {now.step_rows} rows do not come to"
                remedy = f"a batch and an accumulation whose product divides {before.row}"
                where = trainer.boundary.job.config_path
                raise InputError(where, what, key="per_device_train_batch_size", remedy=remedy)
        elif self._layout is not None:
            epochs, steps, *rest, max_steps = values
            done = trainer.boundary.resumed_step
            usual_epoch, usual_steps = divmod(done, steps)
            if (epoch, row) != (usual_epoch, usual_steps * now.step_rows):
                start = self._start = self._layout.start(epoch, row, trainer.args.gradient_accumulation_steps)
                max_steps, epochs = length(start, done, steps, trainer.args.max_steps, trainer.args.num_train_epochs)
                epoch, row = start.epoch, start.row
            values = (epochs, steps, *rest, max_steps)
        self._report(before, Position(epoch, row, now.rows), now)
        return values

    def first(self, found: tuple[int, int]) -> tuple[int, int]:
        """Returns (epoch, batches of it to skip) to go on with; ``found`` is Trainer's own count."""
        restored, accumulation = self._trainer.boundary.restored, self._trainer.args.gradient_accumulation_steps
        if self._start is not None:
            return self._start.epoch, self._start.skipped
        if self._trainer.is_streaming and restored is not None:  # Trainer takes a stream's first epoch for endless
            steps = restored.epoch_steps if self._stream_steps is None else self._stream_steps
            return restored.epoch, steps * accumulation
        return found

    @contextmanager
    def running(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Sets up an epoch and changes ``kwargs``, those of Trainer's ``_run_epoch``, in place."""
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
        """Returns the run's place; at an epoch's end the next one's beginning."""
        now, is_streaming = self._now(), self._trainer.is_streaming
        row = self._offset + self.steps * now.step_rows
        is_over = not is_streaming and (self.steps >= self._steps or row >= now.rows)
        epoch, row = (self.epoch + 1, 0) if is_over else (self.epoch, row)
        return Position(epoch, row, now.rows, now.step_rows, now.made_by)

    def _before(self) -> Position | None:
        """Returns the checkpoint's place. One of an earlier version counts steps, and its commit has their rows."""
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
        packing = bool(args.packing)
        made_by = {
            "packing": packing,
            "packing_strategy": args.packing_strategy if packing else None,
            "max_length": args.max_length,
            "train_sampling_strategy": str(getattr(args, "train_sampling_strategy", "random")),
            "dataloader_drop_last": bool(args.dataloader_drop_last),
        }
        return Position(0, 0, rows, batch * args.gradient_accumulation_steps, made_by)

    def _report(self, before: Position, after: Position, now: Position) -> None:
        """Prints one line if batches or rows are made in another way than before."""
        is_same = (before.rows, before.step_rows, before.made_by) == (now.rows, now.step_rows, now.made_by)
        if is_same or self._trainer.args.process_index != 0:
            return
        steps = f", in steps of {now.step_rows} rows" if before.step_rows != now.step_rows else ""
        steps += f" instead of {before.step_rows}" if steps and before.step_rows else ""
        print(f"[spotune] goes on in {after} (before: {before}){steps}", file=sys.stderr)


# The rows: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.


@dataclass(frozen=True)
class Data:
    """Data sets of rows in one of TRL's formats, and each row's origin; no evaluation if the config has none."""

    train: Any
    evaluation: Any
    train_origins: Origins
    evaluation_origins: Origins | None


def load_data(args: Arguments, job: WorkerJob) -> Data:
    """Reads, checks and mixes the config's data. Raises InputError."""
    wants_evaluation = args.training.eval_strategy != "no"
    data = _load_own(args, job) if job.config.get("data") else _load_as_trl(args, job, wants_evaluation)
    if not wants_evaluation:
        return replace(data, evaluation=None, evaluation_origins=None)
    if data.evaluation is None:
        remedy = 'split: 0.05 on an entry of data, or eval_strategy: "no"'
        what = "there are no held-out rows to evaluate on"
        raise InputError(job.config_path, what, key="eval_strategy", remedy=remedy)
    return data


def _load_own(args: Arguments, job: WorkerJob) -> Data:
    from datasets import concatenate_datasets

    entries = job.config["data"]
    seed = args.training.data_seed if args.training.data_seed is not None else args.training.seed
    text_field, cache = args.training.dataset_text_field, Path(job.cache)
    sources = []
    for at, entry in enumerate(entries):
        # The source's files in the run's record; an entry that is there twice has the same ones.
        recorded = {file["url"]: file for file in job.data_files if file.get("source") == str(entry["source"])}
        sources.append(DataSource(entry, job.config_path, f"data[{at}]", text_field, list(recorded.values())))
    reads = [read_all(source, cache) for source in sources]
    together = [read for inside in reads for read in inside]
    layout = one_layout(together)
    datasets = [dataset_of(inside, layout, cache) for inside in reads]
    if os.environ.get("RANK", "0") == "0":
        for line in [*notices(entries, job.config_path), *twins([read.part for read in together])]:
            print(f"[spotune] data: {line}", file=sys.stderr)
    names = distinct([source.url for source in sources], [source.key for source in sources])
    training, held_out = [], []
    for source, dataset, name in zip(sources, datasets, names, strict=True):
        origins, count = Origins.of_one(name, dataset), source.held_out(len(dataset))
        if count:
            kept, out = divide(len(dataset), count, seed)
            held_out.append((dataset.select(out), origins.select(out)))
            dataset, origins = dataset.select(kept), origins.select(kept)
        training.append((dataset, origins))
    sizes = [len(dataset) for dataset, _ in training]
    taken = counts(sizes, [entry.get("weight") for entry in entries])
    train, origins = training[0]
    if len(training) > 1 or taken != sizes:
        order = interleave(sizes, taken, seed)
        train = concatenate_datasets([dataset for dataset, _ in training]).select(order)
        origins = joined([found for _, found in training]).select(order)
    limit = job.config.get("data_limit")
    if not held_out:
        return Data(_first(train, limit), None, origins.first(limit), None)
    evaluation = concatenate_datasets([dataset for dataset, _ in held_out])
    of_evaluation = joined([found for _, found in held_out])
    return Data(_first(train, limit), _first(evaluation, limit), origins.first(limit), of_evaluation.first(limit))


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: WorkerJob, wants_evaluation: bool) -> Data:
    """Loads ``datasets`` or ``dataset_name`` as TRL's own script does. Raises InputError."""
    import datasets
    from datasets import load_dataset
    from trl import get_dataset

    script = args.script
    key = "datasets" if args.datasets.datasets else "dataset_name"
    files = _local_files(job)
    states = [file_state(file["url"]) for file in files]
    if files:  # `datasets` caches a file by its name and time; this folder goes by the contents
        contents = fingerprint([[Path(file["url"]).name, file["sha256"]] for file in files])
        datasets.config.HF_DATASETS_CACHE = Path(job.cache) / "by-content" / contents[:24]
    try:
        if args.datasets.datasets:
            np.random.seed(args.training.seed)  # test_split_size draws its rows by this; a resume must get the same
            found = get_dataset(args.datasets)
        else:
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except Exception as error:  # only what the config names is read here
        if is_machine_fault(error):
            raise
        _check_reachable(args.datasets.datasets)
        raise InputError(job.config_path, f"cannot be loaded: {error.__cause__ or error}", key=key) from error
    for file, state in zip(files, states, strict=True):
        if file_state(file["url"]) != state:
            raise changed_while_read(file["url"])
    splits = {"dataset_train_split": script.dataset_train_split}
    if wants_evaluation:
        splits["dataset_test_split"] = script.dataset_test_split
    for name, split in splits.items():
        if split not in found:
            remedy = f"it has {', '.join(found)}"
            raise InputError(job.config_path, f"the data set has no split {split!r}", key=name, remedy=remedy)
    train = found[script.dataset_train_split]
    if hasattr(train, "__len__") and not len(train):
        raise InputError(job.config_path, "the data set has no rows", key=key)
    name = script.dataset_name or ", ".join(file for entry in args.datasets.datasets for file in _named(entry))
    if not wants_evaluation:
        return Data(train, None, Origins.of_one(name, train), None)
    evaluation = found[script.dataset_test_split]
    return Data(train, evaluation, Origins.of_one(name, train), Origins.of_one(name, evaluation))


def _check_reachable(entries: Any) -> None:
    """Raises ConnectionError if the server of a URL in ``data_files`` is away; `datasets` calls that a missing file."""
    import fsspec

    for entry in entries or []:
        for url in _named(entry):
            if "://" in url and "*" not in url:
                try:
                    filesystem, path = fsspec.core.url_to_fs(url)
                    filesystem.info(path)
                except Exception as error:
                    if is_machine_fault(error):
                        raise ConnectionError(f"cannot reach {url}: {error.__cause__ or error}") from error


def _named(entry: Any) -> list[str]:
    """Returns the files that an entry of ``datasets`` names, else its path."""
    files = entry.data_files.values() if isinstance(entry.data_files, dict) else [entry.data_files or entry.path]
    return [str(one) for file in files for one in (file if isinstance(file, list) else [file])]


def _local_files(job: WorkerJob) -> list[dict[str, Any]]:
    """Returns the local files of TRL's own keys, with their hashes. Raises InputError if the record has others."""
    found = [file for file in data_files(job.config, job.config_path) if "sha256" in file]
    recorded = [file for file in job.data_files if "sha256" in file]
    for file, known in zip(found, recorded, strict=False):
        if file["sha256"] != known["sha256"]:
            raise not_as_submitted(file["url"], "sha256")
    return found
