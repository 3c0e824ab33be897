"""From a workspace to reports: asks the engine and the bucket, and leaves the bills that are due."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from spotune.cost.index import Index, index_file, use_index
from spotune.cost.refresh import Progress, refresh, report_of
from spotune.launch.infra import is_infra
from spotune.launch.status import LAST_SEEN, find_run
from spotune.launch.workspace import Workspace

Result = TypeVar("Result")


def report_run(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """One run's report. Raises InputError, naming the nearest known one, for a run that nobody knows."""
    status = find_run(workspace, run_id, clock)
    # No rows where the engine's history is out of this machine's reach, or the engine does not answer.
    is_asked = is_infra(status.infra) and not status.reason.startswith(LAST_SEEN)
    history = workspace.infra(status.infra).history(run_id) if is_asked else []
    return report_of(workspace.store(status.bucket), status, history, clock())


def all_runs(
    workspace: Workspace,
    take: Callable[[Index], Result],
    clock: Callable[[], float] = time.time,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
    asks_clusters: bool = False,
) -> Result:
    """What ``take`` takes from the index, once that is up to date.

    Args:
        warn: is told of an engine that does not answer; its runs are then as the bucket has them.
        asks_clusters: SkyPilot is asked first of the dev clusters that were still up when it was last.
    """
    if asks_clusters:
        from spotune.launch.skypilot.booking import book_open  # here: most reports have nothing to book

        book_open(workspace, warn)

    def use(index: Index) -> Result:
        refresh(workspace, index, clock(), warn, progress)
        return take(index)

    return use_index(index_file(workspace.env.cache, workspace.env.bucket), use, warn)
