"""The commands of the processes that the guard starts on the worker's side: ranks, extras, wandb's rebuild."""

import shlex
import sys
from collections.abc import Mapping

from spotune.contracts.environment import WORKER


def worker_command(environ: Mapping[str, str], module: str, *arguments: str) -> list[str]:
    """Returns the command that runs ``module`` with the guard's own Python.

    ``SPOTUNE_WORKER`` names a program in its place, which gets the module's name as its first argument: tests use a
    worker that needs no torch.
    """
    program = shlex.split(environ.get(WORKER, "")) or ["-m"]
    # -P: the user's folder may hold a `datasets/`; it must not shadow the library.
    return [sys.executable, "-P", *program, module, *arguments]
