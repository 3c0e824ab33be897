"""``spotune dev ssh``."""

import sys

import click

from spotune.cli.dev.choose import chosen, cluster_option
from spotune.cli.options import open_workspace


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@cluster_option()
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(cluster: str, command: tuple[str, ...]) -> None:
    """Open a shell on a dev cluster, or run COMMAND there; its exit code is this one's."""
    from spotune.launch.skypilot import ssh

    name = chosen(cluster, open_workspace())
    ssh.write_config(name, everyones=bool(cluster))
    sys.exit(ssh.attach([*ssh.ssh_command(name), *command]))
