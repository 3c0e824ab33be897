"""``python -m spotune.sft CONFIG``: from the command line to an attempt, and to the exit code."""

import argparse
import os
import sys
from collections.abc import Mapping

from spotune.contracts import exits
from spotune.contracts.config import parse_flags
from spotune.contracts.environment import RunEnvironment
from spotune.contracts.errors import InputError, SpotuneError
from spotune.contracts.holds import reach
from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from spotune.guard import admission
from spotune.guard.attempt import Attempt
from spotune.guard.context import Context
from spotune.guard.follower import Follower
from spotune.guard.machine import Machine
from spotune.guard.notices import Notices

USAGE = "python -m spotune.sft CONFIG [--profile P] [--set key=value]... [TRL's own flags]"


def main(argv: list[str]) -> int:
    """Runs one attempt; returns the exit code of the contract (0, 1, 2, 75 or 76)."""
    notices = Notices().install()
    try:
        return run_attempt(parse_arguments(argv), notices, os.environ)
    except SpotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def parse_arguments(argv: list[str]) -> admission.Request:
    """CONFIG, --profile and --set; every other flag is TRL's own and becomes an override."""
    parser = argparse.ArgumentParser(prog="python -m spotune.sft", usage=USAGE, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="", metavar="CONFIG", help="as `trl sft` takes it")
    parser.add_argument("--profile", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    # CONFIG is the first word or comes by --config; a later bare word is the value of the flag before it.
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    try:
        known, flags = parser.parse_known_args(argv[len(named) :])
    except argparse.ArgumentError as error:
        raise InputError("command line", str(error), remedy=USAGE) from error
    return admission.Request((named or [known.config])[0], known.profile, (*parse_flags(flags), *known.sets))


def run_attempt(request: admission.Request, notices: Notices, environ: Mapping[str, str]) -> int:
    """One attempt, from the first look at the bucket to the exit code."""
    env = RunEnvironment.read(environ)
    machine = Machine.read(environ)
    store = Store(env.bucket)
    keys = Keys(admission.choose_run_id(env, machine, request))
    verdict = admission.standing_verdict(store, keys)
    if verdict is not None:
        return verdict
    if notices.given:
        return exits.PREEMPTED
    scratch = env.home / "work" / keys.run_id / f"node-{machine.node_rank}"
    if machine.node_rank:
        return Follower(store, keys, machine, scratch, notices).run(environ)
    run = admission.read_or_create_run(store, keys, env, request)
    machine = Machine.read(environ, run.config.get("num_processes"))
    record = admission.claim_attempt(store, keys, machine, env.attempt)
    reach("claimed")
    context = Context(
        store=store,
        keys=keys,
        run=run,
        record=record,
        machine=machine,
        environ=environ,
        scratch=scratch,
        cache=env.home / "cache" / "datasets",
        status_file=env.status_file,
        patience_s=env.patience_s,
    )
    return Attempt(context, notices).run()
