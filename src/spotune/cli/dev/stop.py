"""``spotune dev stop``."""

import click

from spotune.cli.dev.choose import chosen, cluster_argument, say
from spotune.cli.options import open_workspace


@click.command()
@cluster_argument
def stop(cluster: str) -> None:
    """Stop CLUSTER, default your own, and keep its disk; `dev up` starts it again."""
    from spotune.launch.skypilot import booking, clusters

    workspace = open_workspace()
    name = chosen(cluster, workspace)
    clusters.stop(name)
    booking.book_names(workspace, [name], say)
    say(f"{name}: stopped; its disk is kept, and paid for")
