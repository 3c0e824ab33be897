"""``spotune dev run``."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from spotune.cli.options import config_options, open_workspace


@click.group()
def dev() -> None:
    """Work interactively: `dev run`."""


@dev.command()
@click.argument("config")
@config_options
@click.option("--name", default="", metavar="ID", help="Run id; default from the config's name.")
@click.option("--gpus", metavar="L4:1", help="GPUs of this machine to use.")
@click.option("--env", "envs", multiple=True, metavar="K=V", help="Environment of the run.")
@click.option("--save-every", default="", metavar="50|5m", help="Save every so many steps, or so often.")
def run(config: str, overrides: tuple[str, ...], profile: str, gpus: str | None, **given: str) -> None:
    """Run CONFIG now, here, beside the queue, with its profile `dev`. Ctrl-C stops it; it is never recovered."""
    from spotune.cli.follow import follow
    from spotune.cli.launching import plan_wish, submit_plan
    from spotune.launch import actions
    from spotune.launch.plan import Wish
    from spotune.launch.task import Resources

    workspace = open_workspace()
    wish = Wish(
        config_path=config,
        profile=profile,
        default_profile="dev",
        overrides=overrides,
        infra="local",
        resources=Resources(gpus=gpus, use_spot=False),
        kind="dev",
        **given,  # type: ignore[arg-type]
    )
    plan = plan_wish(wish, workspace)
    with _ended_by_hangup():
        submit_plan(plan, workspace)
        click.echo(f"{plan.run_id}: {plan.bucket}/runs/{plan.run_id}", err=True)
        try:
            code = follow(workspace, plan.run_id)
        except BaseException:
            actions.cancel(workspace, plan.run_id)
            click.echo(f"{plan.run_id}: stopped", err=True)
            raise
    sys.exit(code)


@contextmanager
def _ended_by_hangup() -> Iterator[None]:
    """A closed terminal or a polite kill ends the run like Ctrl-C does."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
