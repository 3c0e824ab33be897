"""What the bucket keeps: the last few commits and the best one. The commit goes first, then its data."""

from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from spotune.guard.restore import list_commits

KEEP = 3


def prune(store: Store, keys: Keys, keep: int, best_step: int | None = None) -> None:
    """Removes all but the newest ``keep`` (at least 1) commits and the best checkpoint's."""
    for (attempt, step), key in list_commits(store, keys)[max(1, keep) :]:
        if step == best_step:
            continue
        store.delete([key])
        store.delete(store.keys(keys.checkpoint(step, attempt)))


def sweep_orphans(store: Store, keys: Keys, attempt: int) -> None:
    """Removes checkpoint data of attempts before ``attempt`` that was never committed."""
    committed = {keys.checkpoint(step, number) for (number, step), _ in list_commits(store, keys)}
    for name in store.folders(keys.checkpoints):
        folder = f"{keys.checkpoints}/{name}"
        number = name.rpartition("-")[2]
        if folder not in committed and number.isdigit() and int(number) < attempt:
            store.delete(store.keys(folder))
