"""From a workspace to reports: asks the engine and the bucket, and leaves the bills that are due."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spotune.contracts.errors import InfraError, InputError
from spotune.cost.ledger import bills_due, write_bills
from spotune.cost.read import read_evidence
from spotune.cost.report import build_report
from spotune.cost.rows import run_row
from spotune.launch.infra import JobStatus, PaidInterval, is_infra
from spotune.launch.status import find_run, list_runs
from spotune.launch.workspace import Workspace

RUNS_AT_A_TIME = 8


def report_run(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """One run's report. Raises InputError, naming the nearest known one, for a run that nobody knows."""
    status = find_run(workspace, run_id, clock)
    return _report(workspace, status, _history(workspace, status), clock())


def report_runs(
    workspace: Workspace,
    since_s: float,
    clock: Callable[[], float] = time.time,
    warn: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """The totals of every run that was submitted within ``since_s``, the newest first.

    ``warn``: is told of an engine that does not answer; its runs are then as the bucket has them.
    """
    now = clock()
    statuses = [status for status in list_runs(workspace, True, clock, warn) if status.submitted_at >= now - since_s]
    statuses.sort(key=lambda status: status.submitted_at, reverse=True)
    histories = [_known_history(workspace, status) for status in statuses]

    def total(status: JobStatus, history: list[PaidInterval]) -> dict[str, Any] | None:
        try:
            return run_row(_report(workspace, status, history, now))
        except InputError:  # the engine remembers a run whose bucket is gone
            return None

    with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        return [row for row in pool.map(total, statuses, histories) if row]


def _known_history(workspace: Workspace, status: JobStatus) -> list[PaidInterval]:
    """As ``_history``; of an engine that does not answer what the bills in the bucket say has to do."""
    try:
        return _history(workspace, status)
    except InfraError:
        return []


def _history(workspace: Workspace, status: JobStatus) -> list[PaidInterval]:
    """The engine's rows; none when its history is out of this machine's reach."""
    return workspace.infra(status.infra).history(status.run_id) if is_infra(status.infra) else []


def _report(workspace: Workspace, status: JobStatus, history: list[PaidInterval], now: float) -> dict[str, Any]:
    store = workspace.store(status.bucket)
    evidence = read_evidence(store, status.run_id, history)
    write_bills(store, bills_due(evidence, now))
    return build_report(evidence, status.state, now)
