"""Tokenizes data with TRL's own code, says what that takes away, and refuses what the model cannot train on.

TRL prepares a data set in one go: tokenize, label, truncate, drop, pack, shuffle. Here it does the first two, the
rows are counted while they still are the rows of the sources, and then it does the rest. Its maps are the same ones
in the same order, so that weights and cached files are those of ``trl sft``.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.events import EventLog
from spotune.contracts.machinefaults import is_machine_fault
from spotune.sft.origins import Origins
from spotune.sft.rowcounts import RowCount, SourceCount, count_rows, rule_of
from spotune.sft.tokenizing import Renderer, explained
from spotune.sft.vocabulary import Limits, check_batch, check_padding, check_rows

SETS = {"train": "training", "eval": "evaluation"}  # TRL's name -> ours


class Preparation:
    """Prepares the data sets of one trainer.

    Args:
        origins: by TRL's name of the data set, ``train`` or ``eval``.
        config_path: for messages.
        events: rank 0's log, None on the others: they say nothing.
    """

    def __init__(self, origins: Mapping[str, Origins], config_path: str, events: EventLog | None) -> None:
        self._origins, self._config_path, self._events = dict(origins), config_path, events
        self._counts: dict[str, RowCount] = {}
        self._limits = Limits(None, None)

    def prepare(
        self, trl_prepare: Callable[..., Any], dataset: Any, renderer: Renderer, packing: bool, name: str
    ) -> Any:
        """The data set as ``trl_prepare``, SFTTrainer's own method, makes it. Raises InputError."""
        processor, args, origins = renderer.processor, renderer.args, self._origins.get(name)
        if origins is None:  # not one of the config's
            return trl_prepare(dataset, processor, args, packing, None, name)
        if origins.is_streamed:
            self._report_stream(origins, name)
            with explained(self._config_path, dataset, origins, renderer):
                return trl_prepare(dataset, processor, args, packing, None, name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        with explained(self._config_path, dataset, origins, renderer):
            tokenized = trl_prepare(dataset, processor, whole, False, None, name)
        self._count(tokenized, renderer.tokenizer, args, packing, name)
        return trl_prepare(tokenized, processor, args, packing, None, name)

    def check_model(self, trainer: Any) -> None:
        """Raises InputError for a token or a length that the trainer's model has no embedding for."""
        if trainer._skip_prepare_dataset and not trainer._is_vision_dataset:  # the user's own tokens, as they are
            self._count_as_they_are(trainer)
        self._limits = Limits.of(trainer.model)
        for count in self._counts.values():
            check_rows(self._limits, trainer._tokenizer, count, self._config_path)
        check_padding(self._limits, trainer, self._config_path)

    @contextmanager
    def reading(self, trainer: Any, name: str) -> Iterator[None]:
        """Around what reads batches: a stream's rows are tokenized only then. Raises InputError."""
        origins = self._origins.get(name)
        if origins is None or not origins.is_streamed:
            yield
            return
        renderer = Renderer(trainer.processing_class, trainer.chat_template, trainer.args)
        with explained(self._config_path, None, origins, renderer):
            yield

    def check_streamed(self, trainer: Any, batches: Iterable[Any]) -> None:
        """Raises InputError for a token or a length of a stream's batches that the model has no embedding for."""
        origins = self._origins.get("train")
        if origins is not None and origins.is_streamed:
            for batch in batches:
                check_batch(self._limits, trainer._tokenizer, batch, origins.names[0], self._config_path)

    @contextmanager
    def settings(self, key: str) -> Iterator[None]:
        """Turns what a library refuses about the config's ``key`` into an InputError."""
        try:
            yield
        except (ValueError, TypeError, LookupError, ImportError) as error:
            if is_machine_fault(error):
                raise
            raise InputError(self._config_path, str(error), key=key) from error

    def wrong_metric(self, args: Any, metrics: Iterable[str]) -> InputError:
        """The error for a ``metric_for_best_model`` that an evaluation does not have."""
        known = ", ".join(name for name in metrics if name.startswith("eval_"))
        what = f"{args.metric_for_best_model!r} is not a metric of this training"
        return InputError(self._config_path, what, key="metric_for_best_model", remedy=f"one of {known}")

    def check_evaluated(self, metrics: Mapping[str, float]) -> None:
        """Raises InputError where no row was left to evaluate on; only of a stream is that not known before."""
        origins = self._origins.get("eval")
        if origins is not None and origins.is_streamed and not any(name.endswith("_loss") for name in metrics):
            what = "no row is left to evaluate on: none has an answer within max_length"
            raise InputError(self._config_path, what, key="max_length", remedy="a greater max_length, or other rows")

    def _count_as_they_are(self, trainer: Any) -> None:
        args = copy.copy(trainer.args)
        args.max_length = None
        for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
            origins = self._origins.get(name)
            if origins is not None and not origins.is_streamed and "input_ids" in dataset.column_names:
                self._count(dataset, trainer._tokenizer, args, False, name)

    def _count(self, dataset: Any, tokenizer: Any, args: Any, packing: bool, name: str) -> None:
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        count = count_rows(dataset, self._origins[name], rule_of(args, packing), special)
        self._counts[name] = count
        self._report(count, args.max_length, name)
        if not count.used:
            raise self._none_left(count, args, name)

    def _report(self, count: RowCount, max_length: int | None, name: str) -> None:
        if self._events is None:
            return
        found = count.by_source()
        sources = [
            {"source": one.source, "rows": one.rows, "dropped": one.dropped, "truncated": one.truncated,
             "empty": one.empty}
            for one in found
        ]  # fmt: skip
        self._events.write("rows", set=SETS[name], max_length=max_length, sources=sources)
        for one in found:
            if losses := losses_of(one, max_length):
                print(f"[spotune] {_named(one.source, name)}: {one.rows} rows, {losses}", file=sys.stderr)

    def _report_stream(self, origins: Origins, name: str) -> None:
        if self._events is None:
            return
        source = origins.names[0]
        nothing = {"rows": None, "dropped": None, "truncated": None, "empty": None}
        self._events.write("rows", set=SETS[name], sources=[{"source": source, **nothing}])
        what = "is streamed, so that rows that are dropped or truncated are not counted"
        print(f"[spotune] {_named(source, name)} {what}", file=sys.stderr)

    def _none_left(self, count: RowCount, args: Any, name: str) -> InputError:
        found = count.by_source()
        rows, empty, unfit = (sum(getattr(one, part) for one in found) for part in ("rows", "empty", "unfit"))
        which = f"none of the {rows} {SETS[name]} rows of {', '.join(one.source for one in found)}"
        if unfit:
            most = args.max_length
            what = f"with {most} tokens {which} has an answer left"
            remedy = "a greater max_length, or shorter prompts"
            return InputError(self._config_path, what, key="max_length", remedy=remedy)
        if empty:
            remedy = "look at the rows and at the chat template"
            return InputError(
                self._config_path, f"{which} has any text once it is tokenized", key="data", remedy=remedy
            )
        remedy = "rows need an answer to learn from: look at them, completion_only_loss and assistant_only_loss"
        return InputError(self._config_path, f"{which} has a token that is trained on", key="data", remedy=remedy)


def losses_of(count: SourceCount, max_length: int | None) -> str:
    """What is lost of a source, in words; empty where nothing is."""
    parts = []
    if count.unfit:
        parts.append(f"{count.unfit} dropped (the answer does not fit max_length {max_length})")
    if without := count.dropped - count.unfit:
        parts.append(f"{without} dropped (no token of them is trained on)")
    if count.truncated:
        parts.append(f"{count.truncated} truncated")
    if count.empty:
        parts.append(f"{count.empty} empty (no text is left once they are tokenized)")
    return ", ".join(parts)


def _named(source: str, name: str) -> str:
    return source if name == "train" else f"{source} ({SETS[name]})"
