"""Where each row of a data set comes from: its source, and its place there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
