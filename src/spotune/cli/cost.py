"""``spotune cost``."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from spotune.cli import log, open_workspace, print_json
from spotune.cli.runs import progress_bar
from spotune.core.environment import parse_duration
from spotune.core.errors import InputError

if TYPE_CHECKING:
    from spotune.cost.index import Index
    from spotune.launch.settings import Workspace

BY = ("user", "team", "infra", "gpu", "day", "week", "kind")


@click.command()
@click.argument("run", required=False)
@click.option(
    "--since", default="30d", metavar="DURATION", show_default=True,
    help="Without RUN: runs submitted within this time; with --by, --clusters and focus: what was paid within it.",
)  # fmt: skip
@click.option("--by", type=click.Choice(BY), help="Without RUN: sum costs by this; kind is dev or prod.")
@click.option("--clusters", is_flag=True, help="Without RUN: dev clusters, their users and their idle time.")
@click.option(
    "--format", "output", type=click.Choice(["table", "json", "csv", "focus"]), default="table", show_default=True,
    help="Output format; focus: FOCUS 1.2, a row for each charge.",
)  # fmt: skip
@click.option("--html", "page", metavar="FILE", help="Also write RUN's report as one self-contained page.")
def cost(run: str | None, since: str, by: str | None, clusters: bool, output: str, page: str | None) -> None:
    """Show where the time and the money went.

    Of RUN: its attempts, the phases of every paid second, and what the same work would have cost on demand.
    Without RUN: one line for every run, or with --by for every user, team, infrastructure, GPU, day or week (UTC).
    With --clusters: the cost of each dev cluster that was paid for within --since, split among its runs and idle time.
    """
    if page is not None and run is None:
        raise InputError("--html", "shows one run", remedy="spotune cost RUN --html FILE")
    if by and (run is not None or output == "focus"):
        what = "cannot sum one RUN" if run is not None else "cannot sum FOCUS rows: each is one charge"
        raise InputError("--by", what, remedy="spotune cost --by team")
    if clusters and (run is not None or by or output == "focus"):
        what = "lists all clusters, not one RUN" if run is not None else "is a table of its own"
        raise InputError("--clusters", what, remedy="spotune cost --clusters")
    since_s = parse_duration(since, "--since")
    if run is not None:
        _one(run, output, page)
    elif clusters:
        _clusters(since, since_s, output)
    else:
        _many(since, since_s, by, output)


def _one(run: str, output: str, page: str | None) -> None:
    from spotune.cost.collect import report_run
    from spotune.cost.export import ATTEMPT_ROW, FOCUS_COLUMNS, attempt_rows, focus_rows, indexed_attempts, run_row
    from spotune.cost.page import check_target, page_of, write_page
    from spotune.cost.tables import run_text
    from spotune.launch.status import LAST_SEEN

    target = None if page is None else check_target(page)
    report = report_run(open_workspace(), run)
    if report["reason"].startswith(LAST_SEEN):
        log(f"{run} is {report['state']} {report['reason']}")
    for line in report["unread"]:
        log(f"left out: {line}")
    if target:
        write_page(target, page_of(report))
    if output == "focus":
        charges = list(focus_rows(run_row(report), indexed_attempts(report), report["bucket"]))
        show(output, report, charges, FOCUS_COLUMNS)
    else:
        show(output, report, attempt_rows(report), ATTEMPT_ROW, lambda: run_text(report))


def _clusters(since: str, since_s: float, output: str) -> None:
    from spotune.cost.dev_clusters import CLUSTER_COLUMNS, cluster_rows, flat_rows, splits_of
    from spotune.cost.tables import clusters_text

    def take(index: "Index") -> Any:
        return cluster_rows(splits_of(store, index, now - since_s, log), index.runs(0.0))

    now, workspace = time.time(), open_workspace()
    store = workspace.store()
    rows = _indexed(workspace, take, asks_clusters=True)
    nothing = f"No dev clusters within {since}."
    show(output, rows, flat_rows(rows), CLUSTER_COLUMNS, lambda: clusters_text(rows, now) if rows else nothing)


def _many(since: str, since_s: float, by: str | None, output: str) -> None:
    import gc

    from spotune.cost.dev_clusters import charges_since, paid_since
    from spotune.cost.export import FOCUS_COLUMNS, RUN, By, columns, focus_rows, group, idle_rows
    from spotune.cost.tables import LISTED, groups_text, runs_text

    gc.disable()  # a tenth of the time goes to collecting thousands of rows that live until the process ends
    from_at, workspace = time.time() - since_s, open_workspace()
    nothing = f"No runs within {since}."
    if by or output == "focus":
        store, read = workspace.store(), paid_since if by else charges_since
        paid = _indexed(workspace, lambda index: read(store, index, from_at, log), asks_clusters=True)
        if by:
            kind: By = by  # type: ignore[assignment]
            rows = group(kind, paid.runs, paid.attempts, paid.idle)
            show(output, rows, rows, columns(kind), lambda: groups_text(by, rows) if rows else nothing)
        else:
            totals = dict(paid.runs)
            of_runs = (row for key, attempt in paid.attempts for row in focus_rows(totals[key], [attempt], key[0]))
            rows = [*of_runs, *idle_rows(paid.idle, store.url)]
            show(output, rows, rows, FOCUS_COLUMNS)
    else:
        wanted = {"names": LISTED} if output == "table" else {}
        rows = [row for _, row in _indexed(workspace, lambda index: index.runs(from_at, **wanted))]
        show(output, rows, rows, RUN, lambda: runs_text(rows) if rows else nothing)


def _indexed(workspace: "Workspace", take: "Callable[[Index], Any]", asks_clusters: bool = False) -> Any:
    """Returns what ``take`` reads from the index, once it is up to date. A long refresh shows a progress bar."""
    from spotune.cost.collect import all_runs

    with progress_bar("reading runs") as progress:
        return all_runs(workspace, take, warn=log, progress=progress, asks_clusters=asks_clusters)


def show(
    output: str, value: Any, rows: list[dict[str, Any]], columns: Sequence[str], text: Callable[[], str] = str
) -> None:
    """Prints the value as JSON, the text as a table, or else the rows with these columns as CSV."""
    from spotune.cost.export import as_csv

    if output == "json":
        print_json(value)
    else:
        click.echo(text() if output == "table" else as_csv(rows, columns), nl=output == "table")
