"""Which rows of which source, in which order: arithmetic only, the same on every machine for the same seed.

limit       the first so many rows of a source
split       of these, seeded: the rows held out for evaluation (below 1 a share, from 1 on a count)
weight      of the rest: the largest mixture in these proportions in which no row comes twice
data_limit  of the mixture, and of the held-out rows: the first so many
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
