"""The command line. A verb's module is imported when the verb is called, its engine even later.

A verb ``x`` is a click command ``x``, in the module that ``MODULES`` names. Only click is imported at the top of these.
"""

import io
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

import click

from spotune.core import exits
from spotune.core.errors import SpotuneError, launcher_code
from spotune.core.output import protect_output

# Groups of verbs: each is imported when it is called.


class Lazy(click.Group):
    """The verb ``x`` is the click command ``x`` of a module. Listing verbs imports none of them.

    Args:
        verbs: their names, and a line of help for each.
        modules: of each verb, relative to ``spotune.cli``; default the module of the verb's name.
    """

    def __init__(
        self,
        *args: Any,
        verbs: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.verbs, self.modules = verbs or {}, modules or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        command: click.Command = getattr(import_module(f"spotune.cli.{self.modules.get(cmd_name, cmd_name)}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            if near := difflib.get_close_matches(args[0], self.verbs, n=1):
                error.message += f" (did you mean {near[0]}?)"
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.verbs.items()))


# stdin, stdout and stderr as every verb may take them: there, and able to write any text.
#
# What is asked for goes to stdout, and a verb that cannot write it fails. What goes to stderr never decides a result.


def open_streams() -> None:
    """A stream that was closed is /dev/null; what the encoding of stdout lacks is written as ``?``, in its width."""
    protect_output(("stderr",))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_output(error: OSError) -> bool:
    """Whether it was raised where output is written; stdout or stderr have no name that an error could tell."""
    step = error.__traceback__
    while step and step.tb_next:
        step = step.tb_next
    return step is not None and step.tb_frame.f_globals["__name__"] in ("click.utils", "rich.console", "spotune.cli")


def let_go() -> None:
    """What stdout has not taken is not tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The command line: one verb, one file. A verb's module is imported when it is called, its engine even later.
#
# A verb ``x`` is the click command ``x`` in ``spotune/cli/x.py``. Only click is imported at the top of these files.

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
MODULES = {
    **dict.fromkeys(("check", "train", "resume"), "train"),
    **dict.fromkeys(("queue", "logs", "cancel", "preempt"), "runs"),
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
            from spotune.core.machine_faults import is_machine_fault

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
    verbs=VERBS,
    modules=MODULES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Fine-tune LLMs on spot GPUs: the same config on this machine, on a cluster, and as a managed job that
    loses nothing when its machine is taken away."""
