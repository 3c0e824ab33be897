"""The command line. A verb's module is imported when the verb is called, and its engine even later.

A verb ``x`` is a click command ``x`` in the module that ``MODULES`` names. These modules import only click and the core
at the top.
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
from spotune.core.errors import InputError, SpotuneError, launcher_code, protect_output

if TYPE_CHECKING:
    from spotune.core.records import PriceRow
    from spotune.launch.engine import JobStatus
    from spotune.launch.origins import Origin
    from spotune.launch.plan import Plan
    from spotune.launch.settings import Workspace


def log(line: str) -> None:
    """Writes a line to stderr."""
    click.echo(line, err=True)


def open_workspace(waiting: Callable[[str], None] = log) -> "Workspace":
    """Returns the workspace of this directory and environment; nothing else in the command line reads them.

    ``waiting`` gets a line when the bucket does not answer for some seconds.
    """
    from spotune.core.environment import HOME
    from spotune.launch.settings import Workspace

    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        raise InputError("this folder", "is gone", remedy="cd to an existing one") from None
    workspace = Workspace.open(dict(os.environ), cwd, waiting)
    home = workspace.env.home
    there = next(place for place in (home, *home.parents) if os.path.exists(place))
    if not there.is_dir():
        raise InputError(HOME, f"{there} is a file", remedy="name a folder, existing or not")
    return workspace


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that overlay a config: ``--profile``, ``--set`` and ``--allow-env``."""
    allow = "Let CONFIG's env: set NAME, which it may not by itself."
    command = click.option("--allow-env", multiple=True, metavar="NAME", help=allow)(command)
    override = "Override a key of the config."
    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=override)(command)
    return click.option("--profile", default="", metavar="NAME", help="Overlay this profile of the config.")(command)


secret_option = click.option(
    "--secret", "secrets", multiple=True, metavar="K", help="Pass K on with its value here; not recorded."
)
stall_option = click.option(
    "--stall-after", default="", metavar="10m",
    help="End an attempt that makes no step for this long, or for 6 median steps; 0: never. Default 10m.",
)  # fmt: skip


def format_option(help_text: str = "Output format.") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--format", "output", type=click.Choice(["table", "json"]), default="table", show_default=True, help=help_text
    )


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, default=str))


def can_ask() -> bool:
    """Returns whether stdin is a terminal."""
    return click.get_text_stream("stdin").isatty()


def agree(question: str, yes: bool) -> None:
    """Asks on stderr, yes by default. Raises InputError at the end of input; exits with 1 on a no."""
    if yes:
        return
    click.echo(f"{question} [Y/n] ", err=True, nl=False)  # click's own confirm writes a space to stdout
    answer = click.get_text_stream("stdin").readline()
    if not answer:
        raise InputError("stdin", "no terminal to confirm on", remedy="add -y")
    if answer.strip().lower() not in ("", "y", "yes"):
        raise click.exceptions.Exit(1)


def plan_text(plan: "Plan", now: float) -> str:
    """Returns a plan as SkyPilot shows one: what would run, what it takes from elsewhere, and the priced offers."""
    from spotune.core.io import columns

    record = plan.record
    shown = list(plan.offers[:10])
    if plan.chosen and plan.chosen not in shown:
        shown[-1:] = [plan.chosen]
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


def fact_lines(facts: Iterable[tuple[str, str]]) -> str:
    from spotune.core.io import plain

    return "\n".join(f"{name:<12}{plain(value)}" for name, value in facts)


def origin_text(origin: "Origin", now: float) -> str:
    """Returns ``run-b by eva: its config``, or ``3 by eva, 2h 5m ago: learning_rate: 0.0001 -> 0.001``."""
    name, colon, rest = origin.what.partition(": ")
    if origin.kind not in ("takes from", "goes to", "revision") or not colon:
        return origin.what
    by = f" by {origin.by}" if origin.by else ""
    age = f", {duration(now - origin.at)} ago" if origin.at else ""
    return f"{name}{by}{age}: {rest}"


def budget_text(plan: "Plan") -> str:
    """Returns ``$20.00, 64h 31m at $0.31 an hour``: how long the budget lasts at the chosen place."""
    from spotune.core.money import usd

    budget_usd = plan.record.budget_usd or 0.0
    nodes = int(plan.submission.task.get("num_nodes") or 1)
    hourly = nodes * plan.chosen.price_usd_per_hour if plan.chosen else 0.0
    lasts = f", {duration(budget_usd / hourly * 3600)} at {usd(hourly)} an hour" if hourly else ""
    return f"{usd(budget_usd)}{lasts}"


def place_of(offer: "PriceRow") -> str:
    """Returns ``aws/us-east-1/us-east-1a``, or as much of it as the row has."""
    places = [place for place in (offer.region, offer.zone) if place not in ("", "*")]
    return offer.infra if offer.infra == "local" else "/".join([offer.infra, *places])


def queue_text(runs: "Sequence[JobStatus]", now: float, reason_width: int | None = None) -> str:
    """Returns the queue as a table; reasons are cut to ``reason_width`` characters."""
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
            "-" if run.step is None else f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step),
            run.infra,
            run.user,
            run.reason if reason_width is None else cut(plain(run.reason), reason_width),
        ]
        for run in runs
    ]
    return columns(header, rows)


def duration(seconds: float) -> str:
    """Returns ``45s``, ``12m 3s``, ``5h 2m`` or ``3d 4h``: the two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or (unit == "s" and not parts):
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2])


class Lazy(click.Group):
    """Verbs that are imported when they are called: ``x`` is the click command ``x`` of a module.

    ``verbs`` has a line of help for each, ``modules`` its module in ``spotune.cli`` if that has another name.
    """

    def __init__(self, *args: Any, verbs: Mapping[str, str], modules: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verbs, self.modules = verbs, modules

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


def is_output(error: OSError) -> bool:
    """Returns whether the error comes from a write to stdout, whose name it does not hold."""
    step = error.__traceback__
    while step and step.tb_next:
        step = step.tb_next
    return step is not None and step.tb_frame.f_globals["__name__"] in ("click.utils", "rich.console", "spotune.cli")


def drop_output() -> None:
    """Discards what stdout has not written yet, so that Python does not try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


VERBS = {
    "check": "Check CONFIG, its data and its model, or this machine, without running anything.",
    "dev": "Work interactively: here, or on a cluster that stops when nobody works on it.",
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


class Verbs(Lazy):
    """Turns every error into one line on stderr and an exit code; several faults of a config are a line each.

    A verb that cannot write its result to stdout fails. A failed write to stderr changes nothing.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        protect_output(("stderr",))  # opens /dev/null for closed streams
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # writes ? for a letter that the encoding lacks
        try:
            code = super().main(*args, **{"prog_name": "spotune", **kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except click.exceptions.Exit as left:
            sys.exit(left.exit_code)
        except click.ClickException as error:
            fail(error.exit_code, _with_remedy(error))
        except (click.Abort, KeyboardInterrupt):
            fail(130, "interrupted")
        except SpotuneError as error:
            fail(launcher_code(error), *error.lines)
        except BrokenPipeError:  # the reader of our output has left
            drop_output()
            sys.exit(1)
        except OSError as error:
            if is_output(error):
                drop_output()
                fail(1, f"cannot write the output: {error.strerror}")
            from spotune.core.store.faults import is_machine_fault

            if not is_machine_fault(error):
                raise
            fail(errors.INFRA_FAILED, f"{error.filename or 'this machine'}: {error.strerror or error}")
        sys.exit(code if isinstance(code, int) else 0)


def _with_remedy(error: click.ClickException) -> str:
    """Returns click's message. If it is about usage and suggests nothing, ``--help`` is added as the remedy."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    has_remedy = "id you mean" in message or "Possible options" in message
    return message if has_remedy or context is None else f"{message} ({context.command_path} --help)"


def fail(code: int, *messages: str) -> NoReturn:
    """Ends the process with a line on stderr for each message."""
    for message in messages:
        log(" ".join(message.split()))
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
