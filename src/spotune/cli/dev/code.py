"""``spotune dev code``."""

import shutil
import sys

import click

from spotune.cli.dev.choose import chosen, cluster_argument, say
from spotune.cli.options import open_workspace


@click.command()
@cluster_argument
@click.option("--print", "only_print", is_flag=True, help="Print the command and the address, open nothing.")
def code(cluster: str, only_print: bool) -> None:
    """Open VS Code on CLUSTER, default your own, in the folder that is synced to it.

    Prints the command and the address where there is no `code` here. An open window counts as work.
    """
    from spotune.launch.skypilot import ssh

    name = chosen(cluster, open_workspace())
    ssh.write_config(name, everyones=bool(cluster))
    folder = ssh.read(name, "cd ~/sky_workdir 2> /dev/null || cd; pwd").strip()
    command = ["code", "--remote", f"ssh-remote+{name}", folder]
    click.echo(f"vscode://vscode-remote/ssh-remote+{name}{folder}")
    click.echo(" ".join(command))
    if only_print or shutil.which("code") is None:
        return
    say("opening VS Code")
    sys.exit(ssh.attach(command))
