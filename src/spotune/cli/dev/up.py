"""``spotune dev up``."""

import click

from spotune.cli.dev.choose import chosen, say
from spotune.cli.options import open_workspace, secret_option


@click.command()
@click.option("--name", default="", metavar="NAME", help="The cluster's name; default one of your own.")
@click.option(
    "--infra", default="", metavar="NAME", help="Where; default as in config/spotune.yaml, else the cheapest."
)
@click.option("--gpus", metavar="L4:1", help="GPUs; default one of the cheap ones in tasks/dev.yaml.")
@click.option("--cpus", metavar="N[+]", help="CPUs of the machine.")
@click.option("--memory", metavar="GB[+]", help="Memory of the machine.")
@click.option(
    *("-i", "--idle-minutes-to-autostop", "idle_minutes"),
    type=int,
    metavar="MINUTES",
    help="Stop it after so long without work; default 30.",
)
@click.option("--down", is_flag=True, help="Take it down then, disk and all, instead of stopping it.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of its setup.")
@secret_option
def up(name: str, infra: str, envs: tuple[str, ...], secrets: tuple[str, ...], **given: object) -> None:
    """Bring up a dev cluster, or reuse the one that is up.

    The code here is synced to it and its environment set up from the lock. A keeper on it counts ssh sessions, VS
    Code, notebooks, jobs, busy CPUs and GPUs as work; without any it stops.
    """
    from spotune.cli.launching import check_month
    from spotune.launch.plan import secrets_of
    from spotune.launch.skypilot.booking import book_names
    from spotune.launch.skypilot.dev import DevWish, place
    from spotune.launch.skypilot.dev import up as bring_up
    from spotune.launch.task import env_pairs

    workspace = open_workspace()
    default = "any" if workspace.settings.infra == "local" else workspace.settings.infra
    values = {"envs": env_pairs(envs), "secrets": secrets_of(secrets, workspace.environ)}
    wish = DevWish(name=chosen(name, workspace), infra=place(infra or default), **values, **given)  # type: ignore[arg-type]
    check_month(workspace)
    done = bring_up(wish, workspace)
    cluster = done.cluster
    book_names(workspace, [cluster.name], say)
    for note in done.notes:
        say(note)
    what = f"{cluster.gpus or 'no GPU'} on {cluster.infra}"
    then = "goes" if done.down else "stops"
    held = f"{then} after {done.idle_minutes} min without work" if done.idle_minutes else "holds as before"
    say(f"{cluster.name} is up{'' if done.is_new else ' already'}: {what}; {held}")
    say(f"next: spotune dev run CONFIG -c {cluster.name} · dev code · dev notebook · dev ssh · dev down")
    click.echo(cluster.name)
