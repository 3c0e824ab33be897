"""The command line: one verb, one file. A verb's module is imported when it is called, its engine even later.

A verb ``x`` is the click command ``x`` in ``spotune/cli/x.py``. Only click is imported at the top of these files.
"""

import sys
from typing import Any, NoReturn

import click

from spotune.cli.lazy import Lazy
from spotune.cli.streams import is_output, let_go, open_streams
from spotune.contracts import exits
from spotune.contracts.errors import SpotuneError, launcher_code

VERBS = {
    "check": "Check CONFIG, its data and its model, or this machine, without running anything.",
    "dev": "Work interactively: here, or on a cluster that goes when nobody works on it.",
    "train": "Submit CONFIG as a job that survives the loss of its machine, and follow it.",
    "queue": "Show what runs, what waits and what has ended.",
    "logs": "Print a run's log.",
    "cancel": "Stop a run and keep its checkpoints.",
    "resume": "Go on with a run that failed, was cancelled or is paused.",
    "preempt": "Take a run's machine away, as a cloud does.",
    "cost": "Show where the time and the money went.",
}
INTERRUPTED = 130


class Verbs(Lazy):
    """Every error is one line on stderr and an exit code; several faults of one config are a line each."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        open_streams()
        try:
            code = super().main(*args, **{"prog_name": "spotune", **kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except click.exceptions.Exit as left:
            sys.exit(left.exit_code)
        except click.UsageError as error:
            fail(_with_remedy(error), error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted", INTERRUPTED)
        except SpotuneError as error:
            for line in error.lines[:-1]:
                click.echo(line, err=True)
            fail(error.lines[-1], launcher_code(error))
        except BrokenPipeError:  # the reader of our output has left
            let_go()
            sys.exit(1)
        except OSError as error:
            if is_output(error):
                let_go()
                fail(f"cannot write the output: {error.strerror}", 1)
            from spotune.contracts.machinefaults import is_machine_fault

            if not is_machine_fault(error):
                raise
            fail(f"{error.filename or 'this machine'}: {error.strerror or error}", exits.INFRA_FAILED)
        sys.exit(code if isinstance(code, int) else 0)


def _with_remedy(error: click.UsageError) -> str:
    """What click says, and where it offers nothing itself, where to look."""
    said = error.format_message()
    has_one = "id you mean" in said or "Possible options" in said
    return said if has_one or error.ctx is None else f"{said} ({error.ctx.command_path} --help)"


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    click.echo(" ".join(message.split()), err=True)
    sys.exit(code)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from spotune import __version__

        click.echo(f"spotune {__version__}")
        ctx.exit()


@click.command(
    cls=Verbs,
    package="spotune.cli",
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Fine-tune LLMs on spot GPUs: the same config on this machine, on a cluster, and as a managed job that
    loses nothing when its machine is taken away."""
