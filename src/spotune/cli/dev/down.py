"""``spotune dev down``."""

import click

from spotune.cli.dev.choose import chosen, cluster_argument, say
from spotune.cli.options import agree, open_workspace


@click.command()
@cluster_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def down(cluster: str, yes: bool) -> None:
    """Take CLUSTER, default your own, down with everything on it."""
    from spotune.launch.skypilot import booking, clusters

    workspace = open_workspace()
    name = chosen(cluster, workspace)
    agree(f"Take {name} down, with everything that is on it. Proceed?", yes)
    clusters.take_down(name)
    booking.book_names(workspace, [name], say)
    say(f"{name}: down")
