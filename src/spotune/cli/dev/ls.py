"""``spotune dev ls``."""

import click

from spotune.cli.dev.choose import say
from spotune.cli.options import format_option, open_workspace, print_json


@click.command()
@format_option()
def ls(output: str) -> None:
    """Show your dev clusters: what each costs an hour now, what holds it, when it stops."""
    import time

    from spotune.cli.dev.listing import clusters_text
    from spotune.launch.skypilot.listing import list_dev

    listed = list_dev(open_workspace(), say)
    if output == "json":
        print_json([each.as_row() for each in listed])
        return
    click.echo(clusters_text(listed, time.time()))
