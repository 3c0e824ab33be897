"""The command line. A verb's module is imported when the verb is called, its engine even later.

A verb ``x`` is a click command ``x``, in the module that ``MODULES`` names. Only click is imported at the top of these.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from spotune.core import errors
from spotune.core.errors import SpotuneError, launcher_code, protect_output

if TYPE_CHECKING:
    from spotune.core.records import PriceRow
    from spotune.launch.engine import JobStatus
    from spotune.launch.origins import Origin
    from spotune.launch.plan import Plan
    from spotune.launch.settings import Workspace

# What several verbs have in common: options, and the workspace that a verb is run in.

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def say(line: str) -> None:
    """Writes a line to stderr."""
    click.echo(line, err=True)


def open_workspace(waiting: Callable[[str], None] = say) -> "Workspace":
    """This directory, this environment. The one place where the command line reads them.

    ``waiting`` is told, in a line, of a bucket that does not answer for some seconds.
    """
    from spotune.core.environment import HOME
    from spotune.core.errors import InputError
    from spotune.launch.settings import Workspace

    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        raise InputError("this folder", "is gone", remedy="cd to one that is there") from None
    workspace = Workspace.open(dict(os.environ), cwd, waiting)
    home = workspace.env.home
    there = next(place for place in (home, *home.parents) if os.path.exists(place))
    if not there.is_dir():
        raise InputError(HOME, f"{there} is a file", remedy="a folder, or one to be made")
    return workspace


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a config is overlaid."""
    for option in (
        click.option(
            "--allow-env", multiple=True, metavar="NAME", help="Let CONFIG's env: set NAME, which it may not by itself."
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."),
        click.option("--profile", default="", metavar="NAME", help="Overlay this profile of the config."),
    ):
        command = option(command)
    return command


def secret_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Values that are passed on without being said: their names, as ``secrets``."""
    help_text = "Pass K on with its value here; not recorded."
    return click.option("--secret", "secrets", multiple=True, metavar="K", help=help_text)(command)


def stall_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """When the watchdog ends an attempt, as ``stall_after``."""
    help_text = "End an attempt that makes no step for so long, or for 6 median steps; 0: never. Default 10m."
    return click.option("--stall-after", default="", metavar="10m", help=help_text)(command)


def format_option(help_text: str = "Output format.") -> Decorator:
    return click.option(
        "--format", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help=help_text
    )


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, default=str))


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return click.get_text_stream("stdin").isatty()


def agree(question: str, yes: bool) -> None:
    """Asks on stderr, yes by default; raises InputError when nobody answers, leaves with 1 on a no."""
    if yes:
        return
    click.echo(f"{question} [Y/n] ", err=True, nl=False)  # click's own confirm writes a space to stdout
    answer = click.get_text_stream("stdin").readline()
    if not answer:  # end of input: not a terminal
        from spotune.core.errors import InputError

        raise InputError("stdin", "nobody to ask", remedy="add -y")
    if answer.strip().lower() not in ("", "y", "yes"):
        raise click.exceptions.Exit(1)


# Tables and words for people.

MAX_OFFERS = 10


def plan_text(plan: "Plan", now: float) -> str:
    """A plan as SkyPilot shows one: what would run, what it takes from elsewhere, and the priced offers."""
    from spotune.core.io import columns

    record = plan.record
    shown = shown_offers(plan)
    offers = [
        [
            place_of(offer),
            offer.instance_type or "-",
            offer.accelerators or "-",
            "spot" if offer.use_spot else "on-demand",
            f"{offer.price_usd_per_hour:.3f}" if offer.price_usd_per_hour else "?",
            "✔" if offer == plan.chosen else "",
        ]
        for offer in shown
    ]
    facts = [
        ("run", plan.run_id),
        ("config", f"{record.config_path} (profile {record.profile or 'prod if it has one'})"),
        ("model", str(record.config["model_name_or_path"])),
        ("data", f"{len(record.data_files)} file(s), {record.data_sha256[:12]}"),
        ("task", str(plan.task_path)),
        ("bucket", plan.bucket),
        ("priority", str(record.priority)),
    ]
    if record.budget_usd is not None:
        facts.append(("budget", budget_text(plan)))
    if plan.submission.preemptions:
        facts.append(("preemptions", f"{len(plan.submission.preemptions)} planned"))
    facts += [(origin.kind, origin_text(origin, now)) for origin in plan.takes]
    facts += plan.code.lines()
    facts += [("note", note) for note in plan.notes]
    text = fact_lines(facts)
    priced = columns(["INFRA", "INSTANCE", "ACCELERATORS", "KIND", "$/HOUR", "CHOSEN"], offers)
    more = f"\n… and {len(plan.offers) - len(shown)} more" if len(plan.offers) > len(shown) else ""
    return f"{text}\n\n{priced}{more}"


def fact_lines(facts: "Iterable[tuple[str, str]]") -> str:
    from spotune.core.io import plain

    return "\n".join(f"{name:<12}{plain(value)}" for name, value in facts)


def origin_text(origin: "Origin", now: float) -> str:
    """``run-b by eva: its config``, ``3 by eva, 2h 5m ago: learning_rate: 0.0001 -> 0.001``."""
    name, colon, rest = origin.what.partition(": ")
    if origin.kind not in ("takes from", "goes to", "revision") or not colon:
        return origin.what
    by = f" by {origin.by}" if origin.by else ""
    age = f", {duration(now - origin.at)} ago" if origin.at else ""
    return f"{name}{by}{age}: {rest}"


def budget_text(plan: "Plan") -> str:
    """``$20.00, 64h 31m at $0.31 an hour``: how far it goes where the run would start."""
    from spotune.core.money import usd

    budget_usd = plan.record.budget_usd or 0.0
    nodes = int(plan.submission.task.get("num_nodes") or 1)
    hourly = nodes * plan.chosen.price_usd_per_hour if plan.chosen else 0.0
    lasts = f", {duration(budget_usd / hourly * 3600)} at {usd(hourly)} an hour" if hourly else ""
    return f"{usd(budget_usd)}{lasts}"


def shown_offers(plan: "Plan") -> "list[PriceRow]":
    """The cheapest ones, and the one that would be taken."""
    shown = list(plan.offers[:MAX_OFFERS])
    return shown if plan.chosen is None or plan.chosen in shown else [*shown[:-1], plan.chosen]


def place_of(offer: "PriceRow") -> str:
    """``aws/us-east-1/us-east-1a``, as far as the row says."""
    places = [place for place in (offer.region, offer.zone) if place not in ("", "*")]
    return offer.infra if offer.infra == "local" else "/".join([offer.infra, *places])


def queue_text(runs: "Sequence[JobStatus]", now: float, reason_width: int | None = None) -> str:
    """The queue for people; reasons are cut to a width where lines would wrap."""
    from spotune.core.io import columns, cut, plain

    header = ["RUN", "STATE", "PRIO", "SUBMITTED", "RUNS FOR", "ATTEMPT", "STEP", "INFRA", "USER", "REASON"]
    rows = [
        [
            run.run_id,
            run.state,
            str(run.priority),
            f"{duration(now - run.submitted_at)} ago",
            duration((run.ended_at or now) - run.started_at) if run.started_at else "-",
            str(run.attempt or "-"),
            progress(run),
            run.infra,
            run.user,
            run.reason if reason_width is None else cut(plain(run.reason), reason_width),
        ]
        for run in runs
    ]
    return columns(header, rows)


def progress(run: "JobStatus") -> str:
    if run.step is None:
        return "-"
    return f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step)


def duration(seconds: float) -> str:
    """``45s``, ``12m 3s``, ``5h 2m``, ``3d 4h``: the two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or (unit == "s" and not parts):
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2])


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
            from spotune.core.store.faults import is_machine_fault

            if not is_machine_fault(error):
                raise
            fail(f"{error.filename or 'this machine'}: {error.strerror or error}", errors.INFRA_FAILED)
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
