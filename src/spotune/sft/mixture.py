"""Which rows of which source, in which order, and where each row comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Which rows of which source, in which order: arithmetic only, the same on every machine for the same seed.
#
# limit       the first so many rows of a source
# split       of these, seeded: the rows held out for evaluation (below 1 a share, from 1 on a count)
# weight      of the rest: the largest mixture in these proportions in which no row comes twice
# data_limit  of the mixture, and of the held-out rows: the first so many

Indices = NDArray[np.int64]


def held_out_count(rows: int, split: float) -> int:
    """How many of ``rows`` a split of 0.1 (a share) or 50 (a count) holds out: at least one."""
    return int(split) if split >= 1 else max(1, round(rows * split))


def divide(rows: int, held_out: int, seed: int) -> tuple[Indices, Indices]:
    """(training rows, held-out rows), each in the order of the file."""
    order = np.random.default_rng([seed, rows]).permutation(rows)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def counts(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows to take from each source; all of them where no source has a weight (missing ones count 1)."""
    if all(weight is None for weight in weights):
        return list(sizes)
    given = [1.0 if weight is None else weight for weight in weights]
    shares = [weight / sum(given) for weight in given]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [min(size, max(1, round(share * total))) for size, share in zip(sizes, shares, strict=True)]


def interleave(sizes: Sequence[int], taken: Sequence[int], seed: int) -> Indices:
    """Indices into the sources laid end to end: every stretch of the mixture has about the mixture's shares.

    A source that is not used up gives a seeded choice of its rows; the order within a source is kept.
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


# Where each row of a data set comes from: its source, and its place there.


@dataclass(frozen=True)
class Origins:
    """The source of each row.

    Attributes:
        names: of the sources.
        source: for each row the index of its name.
        row: for each row its number in the source, from 0.
        is_streamed: the rows are not known before they are read; both arrays are empty.
    """

    names: tuple[str, ...]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    is_streamed: bool = False

    @classmethod
    def of_one(cls, name: str, rows: int | None) -> "Origins":
        """All rows of one source, in order; ``rows`` is None for a stream."""
        count = rows or 0
        return cls((name,), np.zeros(count, np.int32), np.arange(count, dtype=np.int64), is_streamed=rows is None)

    def select(self, indices: NDArray[np.int64]) -> "Origins":
        """The origins of these rows, in this order."""
        return Origins(self.names, self.source[indices], self.row[indices], self.is_streamed)

    def first(self, limit: int | None) -> "Origins":
        """The origins of the first ``limit`` rows; of all where it is None."""
        return Origins(self.names, self.source[:limit], self.row[:limit], self.is_streamed)

    def where(self, index: int) -> tuple[str, int]:
        """(source, row from 1) of the row at ``index``."""
        return self.names[int(self.source[index])], int(self.row[index]) + 1


def joined(parts: Sequence[Origins]) -> Origins:
    """The origins of data sets that are laid end to end."""
    starts = np.cumsum([0, *(len(part.names) for part in parts)])
    return Origins(
        tuple(name for part in parts for name in part.names),
        np.concatenate([part.source + np.int32(start) for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.row for part in parts]),
    )


def distinct(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The names; one that comes twice has its key with it."""
    return [f"{name} ({key})" if names.count(name) > 1 else name for name, key in zip(names, keys, strict=True)]
