"""The live line below a log on a terminal: state, steps, loss, attempt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spotune.launch.engine import JobStatus

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

        def say(line: str) -> None:
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

        yield say, show
