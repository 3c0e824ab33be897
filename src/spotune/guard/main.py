"""``python -m spotune.sft CONFIG``: from the command line to an attempt, and to the exit code."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from spotune.contracts import envrule, exits
from spotune.contracts.change import FLAG
from spotune.contracts.config import parse_flags
from spotune.contracts.environment import NUM_PROCESSES, RunEnvironment
from spotune.contracts.errors import BadRecord, InputError, SpotuneError, StoreError
from spotune.contracts.failpoints import failpoint
from spotune.contracts.keys import Keys
from spotune.contracts.output import protect_output
from spotune.contracts.shapes import clock_fault
from spotune.contracts.store import Patience, Store
from spotune.guard import admission
from spotune.guard.aftercare import finish_owed
from spotune.guard.attempt import Attempt
from spotune.guard.context import Context
from spotune.guard.extras import debt_of
from spotune.guard.follower import Follower
from spotune.guard.leaving import departure, stay_until_killed
from spotune.guard.machine import Machine
from spotune.guard.metadata.places import sources_for
from spotune.guard.metadata.watcher import Watcher
from spotune.guard.notices import Notices
from spotune.guard.own_step import enter_own_step
from spotune.guard.record import read_or_create_run
from spotune.guard.say import say

FIRST_LOOK_S = 300.0
USAGE = "python -m spotune.sft CONFIG [--profile P] [--set key=value]... [--allow-config-change]"
USAGE += " [--allow-env NAME]... [TRL's own flags]"


def main(argv: list[str]) -> int:
    """Runs one attempt; returns the exit code of the contract (0, 1, 2, 75 or 76)."""
    protect_output()
    enter_own_step(argv, os.environ)
    notices = Notices().install()
    try:
        if fault := clock_fault(time.time()):
            return fail_here(fault, notices, os.environ)
        return run_attempt(parse_arguments(argv), notices, os.environ)
    except InputError as error:
        print(error, file=sys.stderr)
        bar_restarts(error, os.environ)
        return error.exit_code
    except StoreError as error:  # no attempt is claimed yet: nobody could count that it failed
        print(error, file=sys.stderr)
        return exits.FAILED if managed_job(os.environ) and not notices.given else error.exit_code
    except SpotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, MemoryError) as error:  # of this machine, before an attempt could record it
        return fail_here(f"{type(error).__name__}: {error}", notices, os.environ)


def fail_here(what: str, notices: Notices, environ: Mapping[str, str]) -> int:
    """Says a fault of this machine before an attempt is claimed; returns the exit code that leads to another one."""
    print(f"this machine: {what}", file=sys.stderr)
    return exits.FAILED if managed_job(environ) and not notices.given else exits.PREEMPTED


def bar_restarts(error: InputError, environ: Mapping[str, str]) -> None:
    """Bad input before an attempt is claimed: a managed job's next machine would only find the same."""
    with suppress(SpotuneError):
        env, machine = RunEnvironment.read(environ), managed_job(environ)
        if machine:
            keys = Keys(admission.choose_run_id(env, machine, admission.Request("", "", ())))
            facts = {"reason": "; ".join(error.lines), "exit_code": error.exit_code}
            admission.leave_mark(Store(env.bucket), keys.failed, keys.run_id, 0, **facts)


def managed_job(environ: Mapping[str, str]) -> Machine | None:
    """This machine where it is one of a managed job's, which SkyPilot starts again: without end after a 75, and a few
    times after an error."""
    machine = Machine.read({name: value for name, value in environ.items() if name != NUM_PROCESSES})
    return machine if machine.job_id else None


def parse_arguments(argv: list[str]) -> admission.Request:
    """CONFIG, --profile, --set and our flags; every other flag is TRL's own and becomes an override."""
    parser = argparse.ArgumentParser(prog="python -m spotune.sft", usage=USAGE, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="", metavar="CONFIG", help="as `trl sft` takes it")
    parser.add_argument("--profile", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(FLAG, action="store_true", help="follow CONFIG though the run began with another one")
    parser.add_argument(envrule.FLAG, action="append", default=[], metavar="NAME", help="let CONFIG's env: set NAME")
    # CONFIG is the first word or comes by --config; a later bare word is the value of the flag before it.
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    try:
        known, flags = parser.parse_known_args(argv[len(named) :])
    except argparse.ArgumentError as error:
        raise InputError("command line", str(error), remedy=USAGE) from error
    overrides = (*parse_flags(flags), *known.sets)
    path, allow_env = (named or [known.config])[0], tuple(known.allow_env)
    return admission.Request(path, known.profile, overrides, known.allow_config_change, allow_env)


def run_attempt(request: admission.Request, notices: Notices, environ: Mapping[str, str]) -> int:
    """One attempt, from the first look at the bucket to the exit code."""
    env = RunEnvironment.read(environ)
    env = replace(env, allow_env=(*env.allow_env, *request.allow_env))
    machine = Machine.read(environ)
    notices.infra, notices.told_grace_s = machine.infra, env.grace_s
    with Watcher(sources_for(machine.infra, environ), notices):
        return attend(request, env, machine, notices, environ)


def attend(
    request: admission.Request, env: RunEnvironment, machine: Machine, notices: Notices, environ: Mapping[str, str]
) -> int:
    """The attempt itself, or this machine's part of it, while notices are watched for."""
    code = work(request, env, machine, notices, environ)
    if code == exits.PREEMPTED and (notice := notices.notice):
        leaving = departure(machine.infra, notice.source, bool(machine.job_id), notices.left_s)
        say(f"{'staying until killed' if leaving.stay else 'leaving'}: {leaving.why}")
        if leaving.stay:
            stay_until_killed(notice.deadline)
    return code


def first_look(
    store: Store,
    keys: Keys,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int | None:
    """The run's verdict; a store that does not answer is asked again for ``patience_s``."""
    until = clock() + patience_s
    while True:
        try:
            return admission.standing_verdict(store, keys)
        except BadRecord:
            raise
        except StoreError:
            if clock() >= until:
                raise
            sleep(1.0)  # one on a disk says at once that it fails


def work(
    request: admission.Request, env: RunEnvironment, machine: Machine, notices: Notices, environ: Mapping[str, str]
) -> int:
    """The exit code of what there was to do."""
    # One request gives up well before the run does: that is said, and a newer checkpoint takes its turn.
    store = Store(env.bucket, Patience(deadline_s=min(Patience.deadline_s, env.patience_s / 4)))
    keys = Keys(admission.choose_run_id(env, machine, request))
    # An outage of minutes would cost a managed job a machine; who starts one by hand waits at a terminal.
    verdict = first_look(store, keys, min(FIRST_LOOK_S, env.patience_s / 4) if machine.job_id else 0.0)
    debt = debt_of(store, keys) if verdict == exits.SUCCEEDED and not machine.node_rank else None
    if verdict is not None and debt is None:
        return verdict
    if notices.given:
        return exits.PREEMPTED
    scratch = env.home / "work" / keys.run_id / f"node-{machine.node_rank}"
    if machine.node_rank:
        return Follower(store, keys, machine, scratch, notices).run(environ)
    if debt:
        envrule.check_env(debt.run.config, keys.record(debt.run.revision), env.allow_env)
    run = debt.run if debt else read_or_create_run(store, keys, env, request)
    machine = Machine.read(environ, run.config.get("num_processes"))
    record = admission.claim_attempt(store, keys, machine, env.attempt, env.gpu_share)
    failpoint("claimed")
    context = Context(
        store=store,
        keys=keys,
        run=run,
        record=record,
        machine=machine,
        environ=environ,
        scratch=scratch,
        cache=env.cache,
        status_file=env.status_file,
        patience_s=env.patience_s,
        allow_config_change=request.allow_config_change or env.allow_config_change,
    )
    return finish_owed(context, notices, debt.names) if debt else Attempt(context, notices).run()
