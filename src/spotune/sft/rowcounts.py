"""Counts what tokenizing takes away from each source, batch by batch in numpy.

Of each row of tokens and labels, before TRL truncates and packs:

    empty      no token is left, or only special ones (the chat template renders nothing of the row)
    dropped    no token of it is trained on: the answer does not fit max_length, or the row has none
    truncated  it is longer than max_length, and what is left of it is trained on

The rest is used whole. The same pass finds the highest token and the longest row, for the model to be checked
against (vocabulary.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spotune.sft.origins import Origins

BATCH_ROWS = 1000  # what `datasets` writes at once, so that a batch is in memory anyway
PROBES = (0.5, 0.25, 0.75, 0.1, 0.9, 0.4, 0.6)  # where in a row to look for a token that is not special
IGNORED = -100  # a label that the loss leaves out

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """What TRL does with a row of tokens.

    Attributes:
        max_length: what is kept of a row; None where all of it is.
        keeps_end: the end is kept, not the start.
        joins_rows: rows are laid end to end, so that the first token of a row has one before it.
        drops: rows are left out whose kept part has no label; else they stay, and nothing is learned from them.
        longest: tokens of the longest sequence that the model can see; None where rows have no limit.
    """

    max_length: int | None
    keeps_end: bool = False
    joins_rows: bool = False
    drops: bool = False
    longest: int | None = None


def rule_of(args: Any, packing: bool) -> Rule:
    """The rule that TRL follows with these settings: packing has its own way with rows that are too long."""
    length = args.max_length
    if not packing:
        return Rule(length, args.truncation_mode == "keep_end", drops=length is not None, longest=length)
    if args.packing_strategy == "bfd":  # cuts a row at max_length, whatever truncation_mode says
        return Rule(length, longest=length)
    return Rule(None, joins_rows=args.packing_strategy == "wrapped", longest=length)  # splits rows, and loses nothing


@dataclass(frozen=True)
class SourceCount:
    """Rows of one source; ``unfit`` of the dropped ones had an answer, which max_length cut off."""

    source: str
    rows: int
    dropped: int
    truncated: int
    empty: int
    unfit: int


@dataclass
class Extreme:
    """The greatest number so far, and the row that it is in."""

    value: int = -1
    index: int = -1

    def see(self, values: Numbers, indices: Numbers) -> None:
        if len(values) and int(values.max()) > self.value:
            at = int(values.argmax())
            self.value, self.index = int(values[at]), int(indices[at])


class RowCount:
    """The counts of one data set.

    Attributes:
        highest: the highest token or label that the model sees.
        lowest: the lowest one, negated; above 0 only in a data set that the user tokenized, and wrongly.
        longest: the longest sequence that the model sees.
        used: rows that are trained on, or evaluated.
    """

    def __init__(self, origins: Origins, rule: Rule, special: Iterable[int]) -> None:
        self.origins, self.rule = origins, rule
        self._special = np.fromiter(sorted(set(special)), np.int64)
        self._counts = {
            name: np.zeros(len(origins.names), np.int64) for name in ("empty", "lost", "truncated", "unfit")
        }
        self.highest, self.lowest, self.longest = Extreme(), Extreme(0), Extreme()
        self.used = 0
        self._seen = self._tokens = 0

    def add(self, table: pa.Table) -> None:
        """Counts the next rows."""
        tokens = Lists.of(table["input_ids"])
        labels = Lists.of(table["labels"]) if "labels" in table.column_names else tokens
        lengths = tokens.ends - tokens.starts
        first, last = self._kept(tokens)
        trained = labels.values != IGNORED
        lead = 0 if self.rule.joins_rows else 1  # nothing predicts a sequence's first token
        had = _any_within(trained, np.minimum(labels.starts + lead, labels.ends), labels.ends)
        first_label, last_label = self._kept(labels)
        has = _any_within(trained, np.minimum(first_label + lead, last_label), last_label)
        is_empty = self._only_special(tokens)
        is_lost = ~has & ~is_empty
        is_used = has & ~is_empty
        is_cut = is_used & (last - first < lengths)
        source = self.origins.source[self._seen : self._seen + len(lengths)]
        for name, flags in (("empty", is_empty), ("lost", is_lost), ("truncated", is_cut), ("unfit", is_lost & had)):
            self._counts[name] += np.bincount(source[flags], minlength=len(self.origins.names))
        self.used += int(is_used.sum())
        if self.rule.drops:
            is_left = _any_within(trained, first_label, last_label)
            last, last_label = np.where(is_left, last, first), np.where(is_left, last_label, first_label)
        self._see_values(tokens, first, last)
        self._see_values(
            Lists(np.where(trained, labels.values, 0), labels.starts, labels.ends), first_label, last_label
        )
        limit = self.rule.longest
        seen = last - first if limit is None else np.minimum(last - first, limit)
        self.longest.see(seen, np.arange(self._seen, self._seen + len(seen)))
        self._tokens += int(lengths.sum())
        if self.rule.joins_rows and limit is not None:
            self.longest.value = min(self._tokens, limit)
        self._seen += len(lengths)

    def by_source(self) -> list[SourceCount]:
        """The counts of each source that has rows here, in the config's order."""
        rows = np.bincount(self.origins.source, minlength=len(self.origins.names))
        return [
            SourceCount(
                source=name,
                rows=int(rows[index]),
                dropped=int(self._counts["lost"][index]),
                truncated=int(self._counts["truncated"][index]),
                empty=int(self._counts["empty"][index]),
                unfit=int(self._counts["unfit"][index]),
            )
            for index, name in enumerate(self.origins.names)
            if rows[index]
        ]

    def _kept(self, lists: "Lists") -> tuple[Numbers, Numbers]:
        """The part of each row that is kept: (first, one after the last), as places in ``values``."""
        if self.rule.max_length is None:
            return lists.starts, lists.ends
        if self.rule.keeps_end:
            return np.maximum(lists.starts, lists.ends - self.rule.max_length), lists.ends
        return lists.starts, np.minimum(lists.ends, lists.starts + self.rule.max_length)

    def _only_special(self, tokens: "Lists") -> Flags:
        """Finds the rows without any other token. Looks at a few tokens of each row first, which settles most."""
        lengths = tokens.ends - tokens.starts
        suspects = np.arange(len(lengths))
        for share in PROBES:
            at = np.minimum(tokens.starts + (lengths * share).astype(np.int64), max(0, len(tokens.values) - 1))[
                suspects
            ]
            is_special = np.isin(tokens.values[at], self._special) if len(tokens.values) else True
            suspects = suspects[is_special | (lengths[suspects] == 0)]
        ends = np.cumsum(lengths[suspects])
        starts = ends - lengths[suspects]
        places = np.repeat(tokens.starts[suspects] - starts, lengths[suspects]) + np.arange(
            int(lengths[suspects].sum())
        )
        found = np.zeros(len(lengths), np.bool_)
        found[suspects] = ~_any_within(~np.isin(tokens.values[places], self._special), starts, ends)
        return found

    def _see_values(self, lists: "Lists", first: Numbers, last: Numbers) -> None:
        """Takes note of the highest and the lowest value. Looks closer only where the batch may have a new one."""
        if not len(lists.values):
            return
        for extreme, sign in ((self.highest, 1), (self.lowest, -1)):
            most = lists.values.max() if sign > 0 else -lists.values.min()
            if int(most) > extreme.value:
                places = np.flatnonzero(_within(first, last, len(lists.values)))
                extreme.see(sign * lists.values[places], self._seen + np.searchsorted(lists.ends, places, side="right"))


@dataclass(frozen=True)
class Lists:
    """A column of lists: row i is ``values[starts[i]:ends[i]]``."""

    values: Numbers
    starts: Numbers
    ends: Numbers

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Lists":
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        array = array.cast(pa.large_list(pa.int64()))
        offsets = array.offsets.to_numpy().astype(np.int64)
        begin, end = int(offsets[0]), int(offsets[-1])
        values = array.values.slice(begin, end - begin).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return cls(values, offsets[:-1] - begin, offsets[1:] - begin)


def count_rows(dataset: Any, origins: Origins, rule: Rule, special: Iterable[int]) -> RowCount:
    """Counts a tokenized data set, whose rows are those of ``origins``; without labels all tokens are trained on."""
    count = RowCount(origins, rule, special)
    for table in _tables(dataset):
        count.add(table)
    return count


def _tables(dataset: Any) -> Iterator[pa.Table]:
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    yield from dataset.select_columns(names).with_format("arrow").iter(BATCH_ROWS)


def _any_within(flags: Flags, starts: Numbers, ends: Numbers) -> Flags:
    """For each range of places whether a flag is set in it."""
    sums = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    found: Flags = sums[ends] > sums[starts]
    return found


def _within(first: Numbers, last: Numbers, size: int) -> Flags:
    """The places that are in one of the ranges, which do not overlap."""
    steps = np.zeros(size + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    inside: Flags = np.cumsum(steps[:-1]) > 0
    return inside
