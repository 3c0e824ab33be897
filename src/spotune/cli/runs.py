"""``spotune queue``, ``logs``, ``cancel`` and ``preempt``; and how a verb follows a run and shows progress."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

import click

import spotune.cli as cli
from spotune.cli import format_option, log, open_workspace, print_json, queue_text
from spotune.core import errors
from spotune.core.environment import parse_duration
from spotune.core.errors import InfraError, InputError

if TYPE_CHECKING:
    from spotune.launch.engine import Infra, JobStatus
    from spotune.launch.status import Outage, Run

_COLOURS = {"RUNNING": "green", "RECOVERING": "yellow", "FAILED": "red", "CANCELLED": "red"}
REFRESH_S = 0.5
View = tuple[Callable[[str], None], Callable[["JobStatus"], None]]  # prints a log line; shows the run's state


@contextmanager
def live_view(run_id: str) -> Iterator[View]:
    """Shows log lines above a live line with the run's state, steps, loss and attempt; for a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False, markup=False)
    with Progress(
        TextColumn(f"[bold]{run_id}"),
        TextColumn("{task.fields[state]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[more]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(run_id, total=None, state="", steps="", more="")

        def show(status: "JobStatus") -> None:
            colour = _COLOURS.get(status.state, "cyan")
            loss = f"loss {status.loss:.4f}  " if status.loss is not None else ""
            bar.update(
                task,
                total=status.max_steps,
                completed=status.step or 0,
                state=f"[{colour}]{status.state}[/]",
                steps=f"{status.step}/{status.max_steps}" if status.max_steps else status.phase,
                more=f"{loss}attempt {max(1, status.attempt)}",
            )

        yield lambda line: console.print(line, soft_wrap=True), show


@contextmanager
def plain_view(run_id: str) -> Iterator[View]:
    """Prints log lines to stdout, and each change of the run's state to stderr."""
    last = ("", "")

    def show(status: "JobStatus") -> None:
        nonlocal last
        if last != (status.state, status.reason):
            last = (status.state, status.reason)
            log(f"{run_id}: {status.state}{f': {status.reason}' if status.reason else ''}")

    yield click.echo, show


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with the work done and the work in all. It draws a bar on stderr.

    It draws nothing for little work, or where stderr is not a terminal.
    """
    bar: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            err = click.get_text_stream("stderr")
            if total < 200 or not err.isatty():  # less is done before a bar can be read
                return
            bar = click.progressbar(length=total, label=label, file=err)
            bar.render_progress()
        bar.update(done - bar.pos)

    try:
        yield update
    finally:
        if bar is not None:
            bar.render_finish()


def follow(run: "Run") -> int:
    """Prints a run's log until the run has ended; returns the exit code of ``train``. The caller handles Ctrl-C."""
    from spotune.launch.status import Outage

    run_id, engine = run.run_id, run.engine or run.workspace.infra(run.status.infra)
    lines: Queue[str | BaseException | None] = Queue(1000)  # None ends it
    threading.Thread(target=_pump, args=(engine.logs(run_id, follow=True), lines), daemon=True).start()
    shown_at, outage = 0.0, Outage()
    with (live_view if sys.stdout.isatty() else plain_view)(run_id) as (print_line, show):
        while True:
            try:
                line = lines.get(timeout=REFRESH_S)
            except Empty:
                line = ""
            else:
                if line is None:
                    break
                if isinstance(line, InfraError):
                    raise _goes_on(run_id, line)
                if isinstance(line, BaseException):
                    raise line
                print_line(settled(line))
            if time.monotonic() - shown_at >= max(REFRESH_S, engine.refresh_s):
                if now := _asked(lambda: _seen(run, engine), run_id, outage):
                    show(now)
                shown_at = time.monotonic()
    while not (ended := _asked(lambda: run.refresh().status, run_id, outage)):
        time.sleep(REFRESH_S)
    step = f" at step {ended.step}" if ended.step is not None else ""
    reason = f": {ended.reason}" if ended.reason else ""
    log(f"{run_id}: {ended.state}{step}, {ended.attempt} attempt(s){reason}")
    return exit_code_of(ended)


def _seen(run: "Run", engine: "Infra") -> "JobStatus":
    """Returns the run's status. For an engine that does not see the run's steps, the bucket supplies them."""
    from spotune.launch.status import certify_if_reachable

    status = engine.jobs([run.run_id])[0]
    return status if engine.name == "local" else certify_if_reachable(status, run.store)


def _asked(ask: Callable[[], "JobStatus"], run_id: str, outage: "Outage") -> "JobStatus | None":
    """Returns the answer, or None while the engine is unreachable; logs the first failure.

    Raises InfraError once the outage lasts too long.
    """
    try:
        status = ask()
    except InfraError as error:
        try:
            if outage.bear(error):
                log(f"engine unreachable, still following {run_id}: {error}")
        except InfraError as last:
            raise _goes_on(run_id, last) from last
        return None
    outage.end()
    return status


def _goes_on(run_id: str, error: InfraError) -> InfraError:
    return InfraError(f"{error}; {run_id} goes on (follow it: spotune logs -f {run_id})")


def settled(line: str) -> str:
    """Returns the last version of a line that was rewritten, as progress bars do."""
    return line.rstrip("\r").rpartition("\r")[2]


def exit_code_of(status: "JobStatus") -> int:
    """Returns the exit code of an attached ``train``."""
    match status.state:
        case "FAILED" if status.by_infra:
            return errors.INFRA_FAILED
        case "SUCCEEDED":
            return errors.SUCCEEDED
        case "PAUSED":
            return errors.PAUSED
        case "FAILED" if status.exit_code in (errors.BAD_INPUT, errors.PREEMPTED):
            return status.exit_code
    return errors.FAILED


def _pump(logs: Iterator[str], lines: Queue[str | BaseException | None]) -> None:
    """Moves log lines into the queue that the main thread reads. An error of any kind travels the same way."""
    try:
        for line in logs:
            lines.put(line)
    except BaseException as error:
        lines.put(error)
    finally:
        lines.put(None)


@click.command()
@click.option(
    "-a", "--all", "everything", is_flag=True,
    help="Also runs of others, runs that ended more than a day ago, and runs outside this machine's queues.",
)  # fmt: skip
@format_option()
def queue(everything: bool, output: str) -> None:
    """Show what runs, what waits and what has ended.

    In the order in which they would run: highest priority first, then order of submission; this machine's runs, then
    SkyPilot's. Without -a: your runs that have not ended, and those that ended within a day. While SkyPilot does not
    answer, a line says so and its runs are missing. While the bucket does not answer, the runs are shown as the queues
    know them.
    """
    from spotune.launch.status import as_row, list_runs

    known: list[JobStatus] = []

    def show_known(line: str) -> None:
        log(line)
        if known:
            log(f"So far, as the queues say:\n{queue_text(known, time.time())}")

    runs = list_runs(open_workspace(show_known), everything, warn=log, known=known.extend)
    if output == "json":
        print_json([as_row(run) for run in runs])
    else:
        width = 40 if sys.stdout.isatty() else None
        click.echo(queue_text(runs, time.time(), width) if runs else "No runs. Start one: spotune train CONFIG")


@click.command()
@click.argument("run")
@click.option(
    "-f",
    "--follow",
    "following",
    is_flag=True,
    help="Follow the log until the run has ended. Ctrl-C leaves it running.",
)
def logs(run: str, following: bool) -> None:
    """Print a run's log, that of all its attempts."""
    from spotune.launch.status import Run

    found = Run.find_queued(open_workspace(), run)
    if following:
        follow(found)
    elif found.engine:
        for line in found.engine.logs(run, follow=False):
            click.echo(settled(line))


@click.command()
@click.argument("run")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(run: str, yes: bool) -> None:
    """Stop a run and keep its checkpoints. Returns when nothing of it runs any more."""
    from spotune.launch import submit
    from spotune.launch.engine import ACTIVE
    from spotune.launch.status import Run

    found = Run.find_queued(open_workspace(), run)
    if found.status.state not in ACTIVE:
        click.echo(f"{run}: {found.status.state} already")
        return
    cli.agree(f"Cancel {run} ({found.status.state})?", yes)
    ended = submit.cancel(found if yes else found.refresh())  # while the user read, the run may have ended
    click.echo(f"{run}: {ended.state}. Its checkpoints are kept: spotune resume {run}")


@click.command()
@click.argument("run")
@click.option("--notice", default="", metavar="30s", help="Warn this long before: SIGTERM, then SIGKILL.")
@click.option("--no-notice", is_flag=True, help="SIGKILL at once; on a cloud: terminate its instances.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before instances of a cloud are terminated.")
def preempt(run: str, notice: str, no_notice: bool, yes: bool) -> None:
    """Take a run's machine away, as a cloud does. The run recovers by itself.

    Slurm and Kubernetes take it with or without a notice. A cloud's instances are terminated without SkyPilot's
    knowledge and without a notice; only the API server's machine can do that.
    """
    from spotune.launch import submit
    from spotune.launch.status import Run

    if bool(notice) == no_notice:
        raise click.UsageError("Give either --notice 30s or --no-notice.")
    notice_s = 0.0 if no_notice else parse_duration(notice, "--notice")

    def ask(question: str) -> None:
        if not yes and not cli.can_ask():
            raise InputError("stdin", f"no terminal to confirm on: {question}", remedy="add -y")
        cli.agree(question, yes)

    submit.preempt(Run.find_queued(open_workspace(), run), notice_s, ask)
    click.echo(f"{run}: its machine goes {f'in {notice_s:g} s' if notice_s else 'now'}")
