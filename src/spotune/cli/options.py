"""What several verbs have in common: options, and the workspace that a verb is run in."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from spotune.launch.settings import Workspace

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def say(line: str) -> None:
    """Writes a line to stderr."""
    click.echo(line, err=True)


def open_workspace(waiting: Callable[[str], None] = say) -> "Workspace":
    """This directory, this environment. The one place where the command line reads them.

    ``waiting`` is told, in a line, of a bucket that does not answer for some seconds.
    """
    from spotune.core.environment import HOME
    from spotune.core.errors import InputError
    from spotune.launch.settings import Workspace

    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        raise InputError("this folder", "is gone", remedy="cd to one that is there") from None
    workspace = Workspace.open(dict(os.environ), cwd, waiting)
    home = workspace.env.home
    there = next(place for place in (home, *home.parents) if os.path.exists(place))
    if not there.is_dir():
        raise InputError(HOME, f"{there} is a file", remedy="a folder, or one to be made")
    return workspace


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a config is overlaid."""
    for option in (
        click.option(
            "--allow-env", multiple=True, metavar="NAME", help="Let CONFIG's env: set NAME, which it may not by itself."
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."),
        click.option("--profile", default="", metavar="NAME", help="Overlay this profile of the config."),
    ):
        command = option(command)
    return command


def secret_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Values that are passed on without being said: their names, as ``secrets``."""
    help_text = "Pass K on with its value here; not recorded."
    return click.option("--secret", "secrets", multiple=True, metavar="K", help=help_text)(command)


def stall_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """When the watchdog ends an attempt, as ``stall_after``."""
    help_text = "End an attempt that makes no step for so long, or for 6 median steps; 0: never. Default 10m."
    return click.option("--stall-after", default="", metavar="10m", help=help_text)(command)


def format_option(help_text: str = "Output format.") -> Decorator:
    return click.option(
        "--format", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help=help_text
    )


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, default=str))


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return click.get_text_stream("stdin").isatty()


def agree(question: str, yes: bool) -> None:
    """Asks on stderr, yes by default; raises InputError when nobody answers, leaves with 1 on a no."""
    if yes:
        return
    click.echo(f"{question} [Y/n] ", err=True, nl=False)  # click's own confirm writes a space to stdout
    answer = click.get_text_stream("stdin").readline()
    if not answer:  # end of input: not a terminal
        from spotune.core.errors import InputError

        raise InputError("stdin", "nobody to ask", remedy="add -y")
    if answer.strip().lower() not in ("", "y", "yes"):
        raise click.exceptions.Exit(1)
