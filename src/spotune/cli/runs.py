"""The live line below a log on a terminal: state, steps, loss, attempt."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Self

import click

from spotune.cli import format_option, open_workspace
from spotune.core import errors
from spotune.core.errors import InfraError

if TYPE_CHECKING:
    from spotune.launch.engine import Infra, JobStatus
    from spotune.launch.status import Outage, Run

_COLOURS = {"RUNNING": "green", "RECOVERING": "yellow", "FAILED": "red", "CANCELLED": "red"}


@contextmanager
def live_view(run_id: str) -> "Iterator[tuple[Callable[[str], None], Callable[[JobStatus], None]]]":
    """Yields how to print a log line above the live line, and how to renew the live line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = ("{task.fields[state]}", "{task.fields[steps]}", "{task.fields[more]}")
    console = Console(highlight=False, markup=False)
    with Progress(
        TextColumn(f"[bold]{run_id}"),
        TextColumn(columns[0]),
        BarColumn(bar_width=24),
        TextColumn(columns[1]),
        TextColumn(columns[2]),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(run_id, total=None, state="", steps="", more="")

        def log(line: str) -> None:
            console.print(line, soft_wrap=True)

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

        yield log, show


# Following a run: its log as it is written, its state as it changes, and the exit code that it comes to.

# A progress bar on stderr for long work, where somebody looks.

FEWEST = 200  # below, it is done before a bar can be read


class ProgressBar:
    """Called with what is done and what there is to do; where that is little, or nobody looks, nothing is drawn."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            err = click.get_text_stream("stderr")
            if total < FEWEST or not err.isatty():
                return
            self._bar = click.progressbar(length=total, label=self._label, file=err)
            self._bar.render_progress()
        self._bar.update(done - self._bar.pos)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()


REFRESH_S = 0.5
MOST_WAITING = 1000  # lines that were read and not shown yet
_END = None
Show = Callable[["JobStatus"], None]
Say = Callable[[str], None]


def follow(run: "Run") -> int:
    """Streams until the run has ended; returns the exit code of ``train``. Ctrl-C is the caller's."""
    from spotune.launch.status import Outage

    run_id, engine = run.run_id, run.engine or run.workspace.infra(run.status.infra)
    lines: Queue[str | BaseException | None] = Queue(MOST_WAITING)
    logs = engine.logs(run_id, follow=True)
    threading.Thread(target=_pump, args=(logs, lines), daemon=True).start()
    shown_at, outage = 0.0, Outage()
    with _view(run_id) as (log, show):
        while True:
            try:
                line = lines.get(timeout=REFRESH_S)
            except Empty:
                line = ""
            else:
                if line is _END:
                    break
                if isinstance(line, InfraError):
                    raise _goes_on(run_id, line)
                if isinstance(line, BaseException):
                    raise line
                log(settled(line))
            if time.monotonic() - shown_at >= max(REFRESH_S, engine.refresh_s):
                if now := _asked(lambda: seen(run, engine), run_id, outage):
                    show(now)
                shown_at = time.monotonic()
    while not (ended := _asked(lambda: run.refresh().status, run_id, outage)):
        time.sleep(REFRESH_S)
    step = f" at step {ended.step}" if ended.step is not None else ""
    reason = f": {ended.reason}" if ended.reason else ""
    click.echo(f"{run_id}: {ended.state}{step}, {ended.attempt} attempt(s){reason}", err=True)
    return exit_code_of(ended)


def seen(run: "Run", engine: "Infra") -> "JobStatus":
    """How the run stands while it is followed; an engine that does not see its steps is helped by the bucket."""
    from spotune.launch.status import certify_if_reachable

    status = engine.jobs([run.run_id])[0]
    return status if engine.name == "local" else certify_if_reachable(status, run.store)


def _asked(ask: Callable[[], "JobStatus"], run_id: str, outage: "Outage") -> "JobStatus | None":
    """What it answers, None while it does not; raises InfraError once that lasts. Of the first time it is said."""
    try:
        status = ask()
    except InfraError as error:
        try:
            if outage.bear(error):
                click.echo(f"{run_id}: goes on unseen, {error}", err=True)
        except InfraError as last:
            raise _goes_on(run_id, last) from last
        return None
    outage.end()
    return status


def _goes_on(run_id: str, error: InfraError) -> InfraError:
    return InfraError(f"{error}; {run_id} goes on (follow it: spotune logs -f {run_id})")


def settled(line: str) -> str:
    """What a terminal would show in the end of a line that was rewritten, as progress bars do."""
    return line.rstrip("\r").rpartition("\r")[2]


def exit_code_of(status: "JobStatus") -> int:
    """What an attached ``train`` exits with."""
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
    """Moves lines to where the main thread can wait for them; an error, whatever it is, travels the same way."""
    try:
        for line in logs:
            lines.put(line)
    except BaseException as error:
        lines.put(error)
    finally:
        lines.put(_END)


@contextmanager
def _view(run_id: str) -> Iterator[tuple[Say, Show]]:
    """How lines and states are shown: a live line below the log on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        with live_view(run_id) as view:
            yield view
        return
    last: list[tuple[str, str]] = []

    def show(status: "JobStatus") -> None:
        if last != [(status.state, status.reason)]:
            last[:] = [(status.state, status.reason)]
            click.echo(f"{run_id}: {status.state}{f': {status.reason}' if status.reason else ''}", err=True)

    yield click.echo, show


# ``spotune queue``, ``logs``, ``cancel`` and ``preempt``.

# ``spotune queue``.


@click.command()
@click.option(
    "-a",
    "--all",
    "everything",
    is_flag=True,
    help="Also those of others, those that ended more than a day ago or elsewhere.",
)
@format_option()
def queue(everything: bool, output: str) -> None:
    """Show what runs, what waits and what has ended.

    In the order that they would run: highest priority first, then order of submission; this machine's runs, then
    SkyPilot's. Without -a: your runs that have not ended, and those that ended within a day. While SkyPilot does not
    answer, that is said and its runs are missing. While the bucket does not answer, the runs are shown as the queues
    know them.
    """
    import time

    from spotune.cli import log, print_json, queue_text
    from spotune.launch.engine import JobStatus
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


# ``spotune logs``.


@click.command()
@click.argument("run")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Go on until the run has ended. Ctrl-C leaves it running."
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


# ``spotune cancel``.


@click.command()
@click.argument("run")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(run: str, yes: bool) -> None:
    """Stop a run and keep its checkpoints. Returns when nothing of it runs any more."""
    from spotune.cli import agree
    from spotune.launch import submit
    from spotune.launch.engine import ACTIVE
    from spotune.launch.status import Run

    found = Run.find_queued(open_workspace(), run)
    if found.status.state not in ACTIVE:
        click.echo(f"{run}: {found.status.state} already")
        return
    agree(f"Cancel {run} ({found.status.state})?", yes)
    ended = submit.cancel(found if yes else found.refresh())  # while the user read, the run may have ended
    click.echo(f"{run}: {ended.state}. Its checkpoints are kept: spotune resume {run}")


# ``spotune preempt``.


@click.command()
@click.argument("run")
@click.option("--notice", default="", metavar="30s", help="Warn this long before: SIGTERM, then SIGKILL.")
@click.option("--no-notice", is_flag=True, help="SIGKILL at once; on a cloud: terminate its instances.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before instances of a cloud are terminated.")
def preempt(run: str, notice: str, no_notice: bool, yes: bool) -> None:
    """Take a run's machine away, as a cloud does. The run recovers by itself.

    Slurm and Kubernetes take it with or without a notice. A cloud's instances are terminated behind SkyPilot's back,
    which only the machine of the API server can do, and which comes without a notice.
    """
    from spotune.cli import agree, can_ask
    from spotune.core.environment import parse_duration
    from spotune.core.errors import InputError
    from spotune.launch import submit
    from spotune.launch.status import Run

    if bool(notice) == no_notice:
        raise click.UsageError("Give either --notice 30s or --no-notice.")
    notice_s = 0.0 if no_notice else parse_duration(notice, "--notice")

    def ask(question: str) -> None:
        if not yes and not can_ask():
            raise InputError("stdin", f"nobody to ask: {question}", remedy="add -y")
        agree(question, yes)

    submit.preempt(Run.find_queued(open_workspace(), run), notice_s, ask)
    click.echo(f"{run}: its machine goes {f'in {notice_s:g} s' if notice_s else 'now'}")
