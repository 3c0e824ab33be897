"""Mixes the rows of sources, records each row's origin, and counts what tokenizing loses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spotune.core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

# The order of rows. Arithmetic only, the same on every machine for the same seed.
#
# limit       the first so many rows of a source
# split       the rows of these that are held out for evaluation, seeded (a share below 1, else a count)
# weight      the largest mixture of the rest in these proportions in which no row comes twice
# data_limit  the first so many rows of the mixture, and of the held-out rows

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def held_out_count(rows: int, split: float) -> int:
    """Returns how many of ``rows`` a split of 0.1 (a share) or 50 (a count) holds out; at least one."""
    return int(split) if split >= 1 else max(1, round(rows * split))


def divide(rows: int, held_out: int, seed: int) -> tuple[Numbers, Numbers]:
    """Returns (training rows, held-out rows), each in the order of the file."""
    order = np.random.default_rng([seed, rows]).permutation(rows)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def counts(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Returns the rows to take from each source: all if no source has a weight. A missing weight counts 1."""
    if all(weight is None for weight in weights):
        return list(sizes)
    given = [1.0 if weight is None else weight for weight in weights]
    shares = [weight / sum(given) for weight in given]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [min(size, max(1, round(share * total))) for size, share in zip(sizes, shares, strict=True)]


def interleave(sizes: Sequence[int], taken: Sequence[int], seed: int) -> Numbers:
    """Returns indices into the concatenated sources. Every stretch of the mixture has about the mixture's shares.

    A source that is not used up gives a seeded choice of its rows. The order within a source stays.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    chosen, places = [], []
    for number, (size, count) in enumerate(zip(sizes, taken, strict=True)):
        rows = np.arange(size)
        if count < size:
            rows = np.sort(np.random.default_rng([seed, number, size]).permutation(size)[:count])
        chosen.append(starts[number] + rows)
        places.append((np.arange(count) + 0.5) / count)
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(chosen)[order].astype(np.int64)


@dataclass(frozen=True)
class Origins:
    """The source and the place of each row of a data set."""

    names: tuple[str, ...]  # of the sources
    source: NDArray[np.int32]  # the index of each row's source in ``names``
    row: Numbers  # each row's number in its source, from 0
    is_streamed: bool = False  # the rows are unknown before they are read; both arrays are empty

    @classmethod
    def of_one(cls, name: str, dataset: Any) -> "Origins":
        """Returns the origins of one source's rows, in order; a stream has no length."""
        is_streamed = not hasattr(dataset, "__len__")
        count = 0 if is_streamed else len(dataset)
        return cls((name,), np.zeros(count, np.int32), np.arange(count, dtype=np.int64), is_streamed)

    def select(self, indices: Numbers) -> "Origins":
        return replace(self, source=self.source[indices], row=self.row[indices])

    def first(self, limit: int | None) -> "Origins":
        """Returns the origins of the first ``limit`` rows; None: of all."""
        return replace(self, source=self.source[:limit], row=self.row[:limit])

    def where(self, index: int) -> tuple[str, int]:
        """Returns (source, row from 1) of the row at ``index``."""
        return self.names[int(self.source[index])], int(self.row[index]) + 1


def joined(parts: Sequence[Origins]) -> Origins:
    starts = np.cumsum([0, *(len(part.names) for part in parts)])
    names = tuple(name for part in parts for name in part.names)
    source = np.concatenate([part.source + np.int32(start) for part, start in zip(parts, starts, strict=False)])
    return Origins(names, source, np.concatenate([part.row for part in parts]))


def distinct(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Returns the names, each with its key if it comes twice."""
    return [f"{name} ({key})" if names.count(name) > 1 else name for name, key in zip(names, keys, strict=True)]


# Counts what tokenizing loses of each source, batch by batch in numpy: rows of tokens and labels, before TRL truncates
# and packs.
#
#     empty      no token is left, or only special ones (the chat template renders nothing of the row)
#     dropped    no token is trained on: the answer does not fit max_length, or the row has none
#     truncated  the row is longer than max_length, and the rest is trained on
#
# All other rows are used whole. The same pass finds the highest token and the longest row, to check the model.

BATCH_ROWS = 1000  # what `datasets` writes at once, so a batch is in memory anyway
PROBES = (0.5, 0.25, 0.75, 0.1, 0.9, 0.4, 0.6)  # where in a row to look for a token that is not special
IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class Rule:
    """What TRL does with a row of tokens."""

    max_length: int | None  # the tokens that are kept of a row; None: all
    keeps_end: bool = False  # the end is kept, not the start
    joins_rows: bool = False  # rows are concatenated, so a row's first token has one before it
    drops: bool = False  # leaves out a row whose kept part has no label; else it stays and teaches nothing
    longest: int | None = None  # the tokens of the longest sequence that the model can see; None: no limit


def rule_of(args: Any, packing: bool) -> Rule:
    """Returns the rule that TRL follows with these settings. Packing treats too long rows in its own way."""
    length = args.max_length
    if not packing:
        return Rule(length, args.truncation_mode == "keep_end", drops=length is not None, longest=length)
    if args.packing_strategy == "bfd":  # cuts a row at max_length, whatever truncation_mode says
        return Rule(length, longest=length)
    return Rule(None, joins_rows=args.packing_strategy == "wrapped", longest=length)  # splits rows and loses nothing


@dataclass(frozen=True)
class SourceCount:
    """Counts of one source's rows; ``unfit`` of the dropped rows had an answer, which max_length cut off."""

    source: str
    rows: int
    dropped: int
    truncated: int
    empty: int
    unfit: int


@dataclass
class Extreme:
    """The greatest number so far, and its row."""

    value: int = -1
    index: int = -1

    def see(self, values: Numbers, indices: Numbers) -> None:
        if len(values) and int(values.max()) > self.value:
            at = int(values.argmax())
            self.value, self.index = int(values[at]), int(indices[at])


_COUNTED = ("empty", "dropped", "truncated", "unfit")


class RowCount:
    def __init__(self, origins: Origins, rule: Rule, special: Iterable[int]) -> None:
        self.origins, self.rule = origins, rule
        self._special = np.fromiter(sorted(set(special)), np.int64)
        self._counts = {name: np.zeros(len(origins.names), np.int64) for name in _COUNTED}
        self.highest, self.longest = Extreme(), Extreme()  # the token or label, and the sequence, that the model sees
        self.lowest = Extreme(0)  # the lowest token, negated; above 0 only if the user tokenized the data, and wrongly
        self.used = 0  # the rows that are trained on, or evaluated
        self._seen = self._tokens = 0

    def add(self, table: "pa.Table") -> None:
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
        for name, flags in zip(_COUNTED, (is_empty, is_lost, is_cut, is_lost & had), strict=True):
            self._counts[name] += np.bincount(source[flags], minlength=len(self.origins.names))
        self.used += int(is_used.sum())
        if self.rule.drops:
            is_left = _any_within(trained, first_label, last_label)
            last, last_label = np.where(is_left, last, first), np.where(is_left, last_label, first_label)
        self._see_values(tokens, first, last)
        labels = replace(labels, values=np.where(trained, labels.values, 0))
        self._see_values(labels, first_label, last_label)
        limit = self.rule.longest
        seen = last - first if limit is None else np.minimum(last - first, limit)
        self.longest.see(seen, np.arange(self._seen, self._seen + len(seen)))
        self._tokens += int(lengths.sum())
        if self.rule.joins_rows and limit is not None:
            self.longest.value = min(self._tokens, limit)
        self._seen += len(lengths)

    def by_source(self) -> list[SourceCount]:
        """Returns the counts of each source that has rows here, in the config's order."""
        rows = np.bincount(self.origins.source, minlength=len(self.origins.names))
        return [
            SourceCount(name, int(rows[index]), **{kind: int(found[index]) for kind, found in self._counts.items()})
            for index, name in enumerate(self.origins.names)
            if rows[index]
        ]

    def _kept(self, lists: "Lists") -> tuple[Numbers, Numbers]:
        """Returns the kept part of each row: (first, one after the last), as places in ``values``."""
        if self.rule.max_length is None:
            return lists.starts, lists.ends
        if self.rule.keeps_end:
            return np.maximum(lists.starts, lists.ends - self.rule.max_length), lists.ends
        return lists.starts, np.minimum(lists.ends, lists.starts + self.rule.max_length)

    def _only_special(self, tokens: "Lists") -> Flags:
        """Finds the rows with special tokens only. A look at a few tokens of each row settles most rows."""
        lengths = tokens.ends - tokens.starts
        suspects = np.arange(len(lengths))
        for share in PROBES:
            places = np.minimum(tokens.starts + (lengths * share).astype(np.int64), max(0, len(tokens.values) - 1))
            at = places[suspects]
            is_special = np.isin(tokens.values[at], self._special) if len(tokens.values) else True
            suspects = suspects[is_special | (lengths[suspects] == 0)]
        ends = np.cumsum(lengths[suspects])
        starts = ends - lengths[suspects]
        places = np.repeat(tokens.starts[suspects] - starts, lengths[suspects])
        places += np.arange(len(places))
        found = np.zeros(len(lengths), np.bool_)
        found[suspects] = ~_any_within(~np.isin(tokens.values[places], self._special), starts, ends)
        return found

    def _see_values(self, lists: "Lists", first: Numbers, last: Numbers) -> None:
        """Records the highest and the lowest value. Looks closer only if the batch may have a new one."""
        if not len(lists.values):
            return
        for extreme, sign in ((self.highest, 1), (self.lowest, -1)):
            most = lists.values.max() if sign > 0 else -lists.values.min()
            if int(most) > extreme.value:
                places = np.flatnonzero(_within(first, last, len(lists.values)))
                extreme.see(sign * lists.values[places], self._seen + np.searchsorted(lists.ends, places, side="right"))


@dataclass(frozen=True)
class Lists:
    """A column of lists; row i is ``values[starts[i]:ends[i]]``."""

    values: Numbers
    starts: Numbers
    ends: Numbers

    @classmethod
    def of(cls, column: "pa.ChunkedArray") -> "Lists":
        import pyarrow as pa

        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        array = array.cast(pa.large_list(pa.int64()))
        offsets = array.offsets.to_numpy().astype(np.int64)
        begin, end = int(offsets[0]), int(offsets[-1])
        values = array.values.slice(begin, end - begin).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return cls(values, offsets[:-1] - begin, offsets[1:] - begin)


def count_rows(dataset: Any, origins: Origins, rule: Rule, special: Iterable[int]) -> RowCount:
    """Counts a tokenized data set with the rows of ``origins``. Without labels all tokens are trained on."""
    count = RowCount(origins, rule, special)
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(BATCH_ROWS):
        count.add(table)
    return count


def _any_within(flags: Flags, starts: Numbers, ends: Numbers) -> Flags:
    """Returns for each range of places whether a flag is set in it."""
    sums = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return sums[ends] > sums[starts]


def _within(first: Numbers, last: Numbers, size: int) -> Flags:
    """Returns which places are in one of the ranges, which do not overlap."""
    steps = np.zeros(size + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    return np.cumsum(steps[:-1]) > 0


# Checks that a model has an embedding for every token and position of the data. If not, a CPU raises an IndexError. A
# GPU fails with a device-side assert that names neither row nor token and looks like a fault of the machine.

_REMEDY = "tokenizer and model do not belong together: take the tokenizer that the model was saved with"
# A multimodal model's encoders have their own positions.
_OTHER_PARTS = ("vision", "visual", "image", "audio", "speech")
_POSITION_NAMES = ("wpe", "position_embeddings", "positions_embed", "embed_positions", "position_embedding")


@dataclass(frozen=True)
class Limits:
    """A model's embeddings: token ids below ``tokens``, positions below ``positions``; None: no limit."""

    tokens: int | None
    positions: int | None


def check_rows(limits: Limits, tokenizer: Any, count: RowCount, config_path: str) -> None:
    """Raises InputError, naming source and row, for a token or position without an embedding."""
    if limits.tokens is not None and count.highest.value >= limits.tokens:
        source, row = count.origins.where(count.highest.index)
        what = _beyond(limits.tokens, tokenizer, count.highest.value)
        raise InputError(source, what, key=f"row {row}", remedy=_REMEDY)
    if count.lowest.value > 0:
        source, row = count.origins.where(count.lowest.index)
        what = f"{-count.lowest.value} is not a token, nor -100, which labels may be"
        raise InputError(source, what, key=f"row {row}", remedy="tokens are whole numbers from 0 on")
    if limits.positions is not None and count.longest.value > limits.positions:
        source, row = count.origins.where(count.longest.index)
        what = f"row {row} of {source} has {count.longest.value} tokens"
        what += f", and the model only {limits.positions} positions"
        raise InputError(config_path, what, key="max_length", remedy=f"max_length: {limits.positions}")


def check_batch(limits: Limits, tokenizer: Any, batch: Any, source: str, config_path: str) -> None:
    """Does the same for one batch of a stream, whose rows are unknown before."""
    tokens = batch.get("input_ids")
    if tokens is None or not tokens.numel():
        return
    highest, longest = int(tokens.max()), tokens.shape[-1]
    if limits.tokens is not None and highest >= limits.tokens:
        raise InputError(source, _beyond(limits.tokens, tokenizer, highest), remedy=_REMEDY)
    if limits.positions is not None and longest > limits.positions and "position_ids" not in batch:
        what = f"a row of {source} has {longest} tokens, and the model only {limits.positions} positions"
        raise InputError(config_path, what, key="max_length", remedy=f"max_length: {limits.positions}")


def check_padding(limits: Limits, trainer: Any, config_path: str) -> None:
    """Raises InputError if batches are padded with a token that the model has no embedding for."""
    args, pad = trainer.args, getattr(trainer.data_collator, "pad_token_id", None)
    at_once = args.per_device_train_batch_size
    if trainer.eval_dataset is not None:
        at_once = max(at_once, int(args.per_device_eval_batch_size))
    if pad is None or limits.tokens is None or pad < limits.tokens or trainer.padding_free or at_once == 1:
        return
    what = f"batches are padded, and {_beyond(limits.tokens, trainer._tokenizer, pad)}"
    raise InputError(config_path, what, key="pad_token", remedy="a pad_token that the model has an embedding for")


def limits_of(model: Any) -> Limits:
    return Limits(_embedding_rows(model), _position_rows(model))


def _embedding_rows(model: Any) -> int | None:
    """Returns the number of tokens that the model has an embedding for; None if unknown."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(embeddings, "num_embeddings", None)  # also right for a sharded weight
    if isinstance(rows, int) and rows > 0:
        return rows
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 2 and len(weight) else None


def _position_rows(model: Any) -> int | None:
    """Returns the number of absolute position embeddings; None if there is no table, as with RoPE."""
    import torch

    modules = [module for name, module in model.named_modules() if _names_positions(name)]
    buffers = [buffer for name, buffer in model.named_buffers() if _names_positions(name)]
    embeddings = [module for module in modules if isinstance(module, torch.nn.Embedding)]
    found = [module.num_embeddings - int(getattr(module, "offset", 0)) for module in embeddings]
    return min([*found, *(int(buffer.shape[0]) for buffer in buffers if buffer.dim() == 2)], default=None)


def _names_positions(name: str) -> bool:
    return name.rpartition(".")[2] in _POSITION_NAMES and not any(part in name for part in _OTHER_PARTS)


def _beyond(rows: int, tokenizer: Any, token: int) -> str:
    text = tokenizer.convert_ids_to_tokens(int(token)) if token < len(tokenizer) else None
    return f"token {token}{f' ({text!r})' if text else ''} is beyond the model's {rows} embeddings"
