"""``spotune dev notebook``."""

import click

from spotune.cli.dev.choose import chosen, cluster_argument, say
from spotune.cli.options import open_workspace, secret_option


@click.command()
@cluster_argument
@click.option("--port", type=click.IntRange(1, 65535), default=8888, show_default=True, metavar="N", help="Port here.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of Jupyter.")
@secret_option
def notebook(cluster: str, port: int, envs: tuple[str, ...], secrets: tuple[str, ...]) -> None:
    """Open Jupyter on CLUSTER, default your own, through an ssh tunnel. Ctrl-C closes the tunnel; Jupyter goes on.

    Called again it finds the Jupyter that is there. Only a kernel that is busy, or was lately, counts as work.
    """
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot import notebook, ssh
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    given, pairs = secrets_of(secrets, workspace.environ), env_pairs(envs)
    name = chosen(cluster, workspace)
    ssh.write_config(name, everyones=bool(cluster))
    server = notebook.find(name)
    if server is None:
        say(f"{name}: starting Jupyter, which is installed there the first time")
        server = notebook.start(name, pairs, given, workspace)
    elif envs or secrets:
        say(f"{name}: Jupyter runs there already, without this --env or --secret (File > Shut Down ends it)")
    click.echo(f"http://localhost:{port}/lab?token={server.token}")
    say("opening the tunnel, Ctrl-C closes it")
    try:
        code = ssh.attach(notebook.tunnel(name, port, server))
    except KeyboardInterrupt:
        say("\ntunnel closed, Jupyter goes on while its kernels work")
        return
    raise SystemExit(code)
