"""``spotune cost``."""

from typing import Any

import click

from spotune.cli.options import open_workspace


@click.command()
@click.argument("run", required=False)
@click.option("--since", default="30d", metavar="DURATION", show_default=True, help="Without RUN: submitted within.")
@click.option(
    "--format", "output", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True,
    help="Output format.",
)  # fmt: skip
@click.option("--html", "page", metavar="FILE", default="", help="Also write RUN's report as one self-contained page.")
def cost(run: str | None, since: str, output: str, page: str) -> None:
    """Show where the time and the money went.

    Of RUN: its attempts, the phases of every paid second, and what the same work would have cost on demand.
    Without RUN: one line for every run.
    """
    from spotune.contracts.durations import parse_duration
    from spotune.contracts.errors import InputError
    from spotune.cost.collect import report_run, report_runs
    from spotune.cost.page import check_target, page_of, write_page
    from spotune.cost.rows import attempt_rows
    from spotune.cost.table import run_text, runs_text

    if page and not run:
        raise InputError("--html", "shows one run", remedy="spotune cost RUN --html FILE")
    target = check_target(page) if page else None
    since_s = parse_duration(since, "--since")
    if run:
        report = report_run(open_workspace(), run)
        if target:
            write_page(target, page_of(report))
        show(output, report, attempt_rows(report), run_text(report))
    else:
        runs = report_runs(open_workspace(), since_s, warn=lambda message: click.echo(message, err=True))
        show(output, runs, runs, runs_text(runs) if runs else f"No runs within {since}.")


def show(output: str, value: Any, rows: list[dict[str, Any]], text: str) -> None:
    """Prints one of three: data, rows or text."""
    from spotune.cli.options import print_json
    from spotune.cost.rows import as_csv

    if output == "json":
        print_json(value)
    else:
        click.echo(as_csv(rows) if output == "csv" else text, nl=output == "table")
