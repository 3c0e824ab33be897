"""``spotune dev``: work interactively, here or on a cluster. One verb, one file, as everywhere."""

import click

from spotune.cli.lazy import Lazy

VERBS = {
    "up": "Bring up a dev cluster, or reuse the one that is up.",
    "run": "Run CONFIG now with its profile `dev`, here or on a dev cluster.",
    "code": "Open VS Code on a dev cluster.",
    "ssh": "Open a shell on a dev cluster, or run a command there.",
    "notebook": "Open Jupyter on a dev cluster.",
    "ls": "Show dev clusters: what they cost, what holds them, when they stop.",
    "stop": "Stop a dev cluster and keep its disk.",
    "down": "Take a dev cluster down, with everything on it.",
}


@click.command(cls=Lazy, package="spotune.cli.dev", verbs=VERBS)
def dev() -> None:
    """Work interactively: here, or on a cluster that goes when nobody works on it."""
