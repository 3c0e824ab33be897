"""What the verbs of ``dev`` have in common: which cluster, and a word to people."""

from typing import TYPE_CHECKING

import click

from spotune.cli.options import Decorator

if TYPE_CHECKING:
    from spotune.launch.workspace import Workspace

cluster_argument = click.argument("cluster", required=False, default="")


def cluster_option(help_text: str = "Which dev cluster; default your own.") -> Decorator:
    return click.option("-c", "--cluster", default="", metavar="NAME", help=help_text)


def chosen(cluster: str, workspace: "Workspace") -> str:
    """The name given, else that of the user's own cluster."""
    from spotune.launch.skypilot.clusters import default_name

    return cluster or default_name(workspace.env.user)


def say(text: str) -> None:
    click.echo(text, err=True)
