"""Following a run: its log as it is written, its state as it changes, and the exit code that it comes to."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import click

from spotune.core import exits
from spotune.core.errors import InfraError

if TYPE_CHECKING:
    from spotune.launch.engine import Infra, JobStatus
    from spotune.launch.settings import Workspace
    from spotune.launch.status import Outage

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


def follow(workspace: "Workspace", run_id: str) -> int:
    """Streams until the run has ended; returns the exit code of ``train``. Ctrl-C is the caller's."""
    from spotune.launch.status import Outage, find_run

    status = find_run(workspace, run_id)
    engine = workspace.infra(status.infra)
    lines: queue.Queue[str | BaseException | None] = queue.Queue(MOST_WAITING)
    logs = engine.logs(run_id, follow=True)
    threading.Thread(target=_pump, args=(logs, lines), daemon=True).start()
    shown_at, outage = 0.0, Outage()
    with _view(run_id) as (say, show):
        while True:
            try:
                line = lines.get(timeout=REFRESH_S)
            except queue.Empty:
                line = ""
            else:
                if line is _END:
                    break
                if isinstance(line, InfraError):
                    raise _goes_on(run_id, line)
                if isinstance(line, BaseException):
                    raise line
                say(settled(line))
            if time.monotonic() - shown_at >= max(REFRESH_S, engine.refresh_s):
                if now := _asked(lambda: seen(workspace, engine, run_id), run_id, outage):
                    show(now)
                shown_at = time.monotonic()
    while not (ended := _asked(lambda: find_run(workspace, run_id), run_id, outage)):
        time.sleep(REFRESH_S)
    step = f" at step {ended.step}" if ended.step is not None else ""
    reason = f": {ended.reason}" if ended.reason else ""
    click.echo(f"{run_id}: {ended.state}{step}, {ended.attempt} attempt(s){reason}", err=True)
    return exit_code_of(ended)


def seen(workspace: "Workspace", engine: "Infra", run_id: str) -> "JobStatus":
    """How the run stands while it is followed; an engine that does not see its steps is helped by the bucket."""
    from spotune.launch.status import certify_if_reachable

    status = engine.jobs([run_id])[0]
    return status if engine.name == "local" else certify_if_reachable(status, workspace.store(status.bucket))


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
            return exits.INFRA_FAILED
        case "SUCCEEDED":
            return exits.SUCCEEDED
        case "PAUSED":
            return exits.PAUSED
        case "FAILED" if status.exit_code in (exits.BAD_INPUT, exits.PREEMPTED):
            return status.exit_code
    return exits.FAILED


def _pump(logs: Iterator[str], lines: "queue.Queue[str | BaseException | None]") -> None:
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
        from spotune.cli.live import live_view

        with live_view(run_id) as view:
            yield view
        return
    last: list[tuple[str, str]] = []

    def show(status: "JobStatus") -> None:
        if last != [(status.state, status.reason)]:
            last[:] = [(status.state, status.reason)]
            click.echo(f"{run_id}: {status.state}{f': {status.reason}' if status.reason else ''}", err=True)

    yield click.echo, show
