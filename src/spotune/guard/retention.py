"""What the bucket keeps: the last few commits, every k-th, and the best one. The commit goes first, then its data.

A commit that did not verify counts for nothing: it neither protects nor displaces another one.
"""

from collections.abc import Collection

from spotune.contracts.errors import BadRecord
from spotune.contracts.failpoints import failpoint
from spotune.contracts.keys import Keys, checkpoint_of
from spotune.contracts.records import Commit
from spotune.contracts.store import Store
from spotune.guard.restore import list_commits

KEEP = 3
# Never one alone: the newest may turn out to be damaged, and a zombie may tidy up while its successor restores.
LEAST = 2
UNFINISHED_S = 3600.0  # an upload that has been going on for so long is nobody's any more


class Retention:
    """Tidies up after each commit of one attempt.

    Args:
        keep: how many of the newest commits stay (at least two do).
        keep_every: every commit whose ordinal is a multiple stays for good; 0: none does.
        bad: keys of commits that did not verify when this attempt restored.
    """

    def __init__(
        self, store: Store, keys: Keys, attempt: int, keep: int = KEEP, keep_every: int = 0, bad: Collection[str] = ()
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._keep, self._keep_every, self._bad = max(LEAST, keep), keep_every, set(bad)
        self._swept = False
        self._kept_for_good: set[str] = set()

    def tidy(self, best_step: int | None = None) -> None:
        """Removes what need not stay. Raises StoreError; to be called again then."""
        listed = list_commits(self._store, self._keys)
        good = [(number, key) for number, key in listed if key not in self._bad]
        for (attempt, step), key in good[self._keep :]:
            if step != best_step and not self._is_kept_for_good(key):
                self._remove(key, step, attempt)
        if len(good) >= LEAST:  # a damaged one is of no use to anybody once there is enough else
            for (attempt, step), key in listed:
                if key in self._bad:
                    self._remove(key, step, attempt)
        if not self._swept:
            self._sweep()
            self._swept = True

    def _is_kept_for_good(self, key: str) -> bool:
        if not self._keep_every:
            return False
        if key not in self._kept_for_good:
            try:
                data = self._store.read(key)
                if data is None or Commit.from_bytes(data, key).ordinal % self._keep_every:
                    return False
            except BadRecord:  # no number that would keep it
                return False
            self._kept_for_good.add(key)
        return True

    def _remove(self, key: str, step: int, attempt: int) -> None:
        self._store.delete([key])
        failpoint("pruning")
        self._store.delete(self._store.keys(self._keys.checkpoint(step, attempt)))

    def _sweep(self) -> None:
        """Removes what attempts before this one uploaded and never committed, unfinished uploads included."""
        listed = list_commits(self._store, self._keys)
        committed = {self._keys.checkpoint(step, attempt) for (attempt, step), _ in listed}
        for name in self._store.folders(self._keys.checkpoints):
            folder = f"{self._keys.checkpoints}/{name}"
            number = checkpoint_of(name)
            if folder not in committed and number and number[0] < self._attempt:
                self._store.delete(self._store.keys(folder))
        # Right after a commit this attempt uploads nothing, so that what is unfinished is of those before it.
        self._store.abort_uploads(self._keys.checkpoints, 0.0)
        self._store.abort_uploads(self._keys.root, UNFINISHED_S)
