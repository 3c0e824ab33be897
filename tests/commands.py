"""The command line as tests call it."""

import inspect

from click.testing import CliRunner


def cli_runner() -> CliRunner:
    """Returns a runner that keeps stdout and stderr apart. click before 8.2 mixes them unless told not to."""
    known = inspect.signature(CliRunner.__init__).parameters
    return CliRunner(**{"mix_stderr": False} if "mix_stderr" in known else {})
