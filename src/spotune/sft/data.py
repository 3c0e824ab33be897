"""The place in the data, in rows of an epoch, and one trainer's epochs."""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler

from spotune.core.errors import InputError
from spotune.core.fingerprint import changed_while_read, data_files, file_state, not_as_submitted, notices
from spotune.core.protocol import Job
from spotune.core.records import fingerprint
from spotune.core.store.faults import is_machine_fault
from spotune.sft.arguments import Arguments
from spotune.sft.row_counts import Origins, counts, distinct, divide, interleave, joined
from spotune.sft.sources import Source, dataset_of, one_layout, read_all, twins

# The place in the data, in rows of an epoch, so that a run goes on there when its batches have another size.
#
# Trainer counts in batches: under another batch size, accumulation or ``drop_last`` the same number of batches is
# another row. The order of an epoch's rows depends on the seed and on how many rows there are, not on batches. So a
# checkpoint says how many rows of its epoch are trained, and the epoch goes on with the row after these, in batches of
# today's size. Its steps are counted as if the rows before had come in such batches too.
#
# Where other rows are made of the same text (packing), there is no such place, and the run is refused.

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


# One trainer's epochs: where in the data a run goes on, and where it is. See ``position.py``.


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


# What the run trains on and is evaluated on: ``data:``, or TRL's own ``datasets`` and ``dataset_name``.
#
# ``load_data`` is the seam: whatever reads and mixes behind it (later also streamed), the trainer gets
# data sets of rows in one of TRL's formats.


@dataclass(frozen=True)
class Data:
    """Data sets of rows, and where each row comes from; ``evaluation`` is None when the config evaluates nothing."""

    train: Any
    evaluation: Any
    train_origins: Origins
    evaluation_origins: Origins | None


def load_data(args: Arguments, job: Job) -> Data:
    """Reads, checks and mixes the data that the config names. Raises InputError."""
    wants_evaluation = args.training.eval_strategy != "no"
    data = _load_own(args, job) if job.config.get("data") else _load_as_trl(args, job, wants_evaluation)
    if not wants_evaluation:
        return replace(data, evaluation=None, evaluation_origins=None)
    if data.evaluation is None:
        remedy = 'split: 0.05 on an entry of data, or eval_strategy: "no"'
        raise InputError(
            job.config_path, "there are no held-out rows to evaluate on", key="eval_strategy", remedy=remedy
        )
    return data


def _load_own(args: Arguments, job: Job) -> Data:
    from datasets import concatenate_datasets

    entries = job.config["data"]
    seed = args.training.data_seed if args.training.data_seed is not None else args.training.seed
    text_field, cache = args.training.dataset_text_field, Path(job.cache)
    sources = [
        Source(entry, job.config_path, f"data[{at}]", text_field, _recorded(job, str(entry["source"])))
        for at, entry in enumerate(entries)
    ]
    reads = [read_all(source, cache) for source in sources]
    layout = one_layout([read for inside in reads for read in inside])
    datasets = [dataset_of(inside, layout, cache) for inside in reads]
    _say([*notices(entries, job.config_path), *twins([read.part for inside in reads for read in inside])])
    names = distinct([source.url for source in sources], [source.key for source in sources])
    divided = [
        _held_out(source, dataset, Origins.of_one(name, len(dataset)), seed)
        for source, dataset, name in zip(sources, datasets, names, strict=True)
    ]
    training, held_out = [kept for kept, _ in divided], [out for _, out in divided if out is not None]
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


def _recorded(job: Job, source: str) -> list[dict[str, Any]]:
    """The facts of a source's files in the run's record; an entry that is there twice has the same ones."""
    return list({file["url"]: file for file in job.data_files if file.get("source") == source}.values())


def _say(lines: list[str]) -> None:
    """Prints what people may not have meant, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"[spotune] data: {line}", file=sys.stderr)


Part = tuple[Any, Origins]  # a data set, and where its rows come from


def _held_out(source: Source, dataset: Any, origins: Origins, seed: int) -> tuple[Part, Part | None]:
    count = source.held_out(len(dataset))
    if not count:
        return (dataset, origins), None
    kept, out = divide(len(dataset), count, seed)
    return (dataset.select(kept), origins.select(kept)), (dataset.select(out), origins.select(out))


def _first(dataset: Any, limit: int | None) -> Any:
    return dataset if limit is None or len(dataset) <= limit else dataset.select(np.arange(limit))


def _load_as_trl(args: Arguments, job: Job, wants_evaluation: bool) -> Data:
    """What TRL's own script does with ``datasets`` and ``dataset_name``, and nothing else."""
    import datasets
    from datasets import load_dataset
    from trl import get_dataset

    script = args.script
    key = "datasets" if args.datasets.datasets else "dataset_name"
    files = _local_files(job)
    states = [file_state(file["url"]) for file in files]
    if files:  # datasets knows a file by its name and time; this folder is of these contents
        contents = fingerprint([[Path(file["url"]).name, file["sha256"]] for file in files])
        datasets.config.HF_DATASETS_CACHE = Path(job.cache) / "by-content" / contents[:24]
    try:
        if args.datasets.datasets:
            np.random.seed(args.training.seed)  # test_split_size takes its rows by this; a resume must get the same
            found = get_dataset(args.datasets)
        else:
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except Exception as error:  # only what the config names is read here
        if is_machine_fault(error):
            raise
        _reach(args.datasets.datasets)
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
        return Data(train, None, _origins(name, train), None)
    evaluation = found[script.dataset_test_split]
    return Data(train, evaluation, _origins(name, train), _origins(name, evaluation))


def _reach(entries: Any) -> None:
    """Raises ConnectionError for a URL of ``data_files`` whose server is away: `datasets` calls that a missing file."""
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
    """The files that an entry of ``datasets`` names, else its path."""
    files = entry.data_files.values() if isinstance(entry.data_files, dict) else [entry.data_files or entry.path]
    return [str(one) for file in files for one in (file if isinstance(file, list) else [file])]


def _origins(name: str, dataset: Any) -> Origins:
    return Origins.of_one(name, len(dataset) if hasattr(dataset, "__len__") else None)


def _local_files(job: Job) -> list[dict[str, Any]]:
    """The local files that TRL's own keys name, with their hashes. Raises InputError if the record has others."""
    found = [file for file in data_files(job.config, job.config_path) if "sha256" in file]
    recorded = [file for file in job.data_files if "sha256" in file]
    for file, known in zip(found, recorded, strict=False):
        if file["sha256"] != known["sha256"]:
            raise not_as_submitted(file["url"], "sha256")
    return found
