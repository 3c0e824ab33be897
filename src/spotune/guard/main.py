"""``python -m spotune.sft CONFIG``: from the command line to an attempt, and to the exit code."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from spotune.core import config_values, exits
from spotune.core.config import parse_flags
from spotune.core.environment import NUM_PROCESSES, OWN_STEP, RunEnvironment
from spotune.core.errors import BadRecord, InputError, SpotuneError, StoreError
from spotune.core.failpoints import failpoint
from spotune.core.fields import clock_fault
from spotune.core.keys import Keys
from spotune.core.output import protect_output
from spotune.core.revisions import FLAG
from spotune.core.store import Patience, Store
from spotune.guard import claim
from spotune.guard.attempt import Attempt
from spotune.guard.claim import read_or_create_run
from spotune.guard.context import Context, Machine
from spotune.guard.extras import debt_of, finish_owed
from spotune.guard.follower import Follower
from spotune.guard.journal import say
from spotune.guard.leaving import Notices, departure, stay_until_killed
from spotune.guard.notice_sources import Watcher, sources_for

# On Slurm the guard runs in a job step of its own, so that notices reach it.
#
# Slurm signals the first process of each step only. In the step that SkyPilot starts that is SkyPilot's executor: a
# SIGTERM kills it, all below it goes with it, and training never hears of the preemption. The same is true of a
# batch script. So where there is a Slurm job around it the guard starts itself again as the first process of a step
# that shares the job's resources, and task YAMLs stay plain.

UNBOUND = "--cpu-bind=none"
NO_BINDING = "lacks support for cpu binding"
PROBE_S = 60.0  # Slurm may be busy; a step is made in tenths of a second


def enter_own_step(argv: list[str], environ: Mapping[str, str]) -> None:
    """Replaces this process by the same command in a step of its own; returns where that is not needed or not had."""
    if not wants_step(environ, os.getpid()) or not shutil.which("srun"):
        return
    step = srun_command(environ, socket.gethostname())
    made, said = _probe(step)
    if not made:
        say(f"no step of its own in Slurm job {environ['SLURM_JOB_ID']}, notices may not arrive: {said}")
        return
    if NO_BINDING in said:
        step.remove(UNBOUND)
    say(f"in a step of its own in Slurm job {environ['SLURM_JOB_ID']}, so that notices arrive")
    command = [*step, sys.executable, "-m", "spotune.sft", *argv]
    os.execvpe("srun", command, {**environ, OWN_STEP: environ["SLURM_JOB_ID"]})


def wants_step(environ: Mapping[str, str], pid: int) -> bool:
    """Whether process ``pid`` is in a Slurm job, but not the first process of a step.

    Not on a SkyPilot dev cluster: there several tasks may share a node, a new step could be given another task's GPU,
    and nobody would recover the task.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job or environ.get(OWN_STEP) == job or environ.get("SLURM_TASK_PID") == str(pid):
        return False
    return bool(environ.get("SKYPILOT_MANAGED_JOB_ID")) or not environ.get("SKYPILOT_CLUSTER_INFO")


def srun_command(environ: Mapping[str, str], host: str) -> list[str]:
    """The command that starts what follows it in a step on this node, with all that the job has here."""
    node = environ.get("SLURMD_NODENAME") or host.split(".", 1)[0]
    # Steps of this name are what SkyPilot ends when the task is cancelled.
    task = environ.get("SKYPILOT_INTERNAL_JOB_ID", "")
    command = ["srun", "--overlap", f"--jobid={environ['SLURM_JOB_ID']}", "--nodes=1", "--ntasks=1"]
    command += [f"--nodelist={node}", f"--job-name={f'sky-{task}' if task else 'spotune'}"]
    if gpus := _count(environ.get("CUDA_VISIBLE_DEVICES", "")):
        command.append(f"--gres=gpu:{gpus}")
    # A step has all of the job's CPUs, but its first process would be bound to one of them.
    command += [UNBOUND, "--mem=0"]
    return [*command, "--export=ALL", "--input=none", "--unbuffered", "--quiet"]


def _count(devices: str) -> int:
    return len([device for device in devices.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])


def _probe(step: list[str]) -> tuple[bool, str]:
    """Whether Slurm makes such a step, and what it says: a step that fails must not be taken for a run that fails."""
    try:
        done = subprocess.run([*step, "true"], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    said = " ".join(done.stderr.split())
    return done.returncode == 0, said or f"srun ended with exit code {done.returncode}"


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
            keys = Keys(claim.choose_run_id(env, machine, claim.Request("", "", ())))
            facts = {"reason": "; ".join(error.lines), "exit_code": error.exit_code}
            claim.leave_mark(Store(env.bucket), keys.failed, keys.run_id, 0, **facts)


def managed_job(environ: Mapping[str, str]) -> Machine | None:
    """This machine where it is one of a managed job's, which SkyPilot starts again: without end after a 75, and a few
    times after an error."""
    machine = Machine.read({name: value for name, value in environ.items() if name != NUM_PROCESSES})
    return machine if machine.job_id else None


def parse_arguments(argv: list[str]) -> claim.Request:
    """CONFIG, --profile, --set and our flags; every other flag is TRL's own and becomes an override."""
    parser = argparse.ArgumentParser(prog="python -m spotune.sft", usage=USAGE, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="", metavar="CONFIG", help="as `trl sft` takes it")
    parser.add_argument("--profile", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(FLAG, action="store_true", help="follow CONFIG though the run began with another one")
    parser.add_argument(
        config_values.FLAG, action="append", default=[], metavar="NAME", help="let CONFIG's env: set NAME"
    )
    # CONFIG is the first word or comes by --config; a later bare word is the value of the flag before it.
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    try:
        known, flags = parser.parse_known_args(argv[len(named) :])
    except argparse.ArgumentError as error:
        raise InputError("command line", str(error), remedy=USAGE) from error
    overrides = (*parse_flags(flags), *known.sets)
    path, allow_env = (named or [known.config])[0], tuple(known.allow_env)
    return claim.Request(path, known.profile, overrides, known.allow_config_change, allow_env)


def run_attempt(request: claim.Request, notices: Notices, environ: Mapping[str, str]) -> int:
    """One attempt, from the first look at the bucket to the exit code."""
    env = RunEnvironment.read(environ)
    env = replace(env, allow_env=(*env.allow_env, *request.allow_env))
    machine = Machine.read(environ)
    notices.infra, notices.told_grace_s = machine.infra, env.grace_s
    with Watcher(sources_for(machine.infra, environ), notices):
        return attend(request, env, machine, notices, environ)


def attend(
    request: claim.Request, env: RunEnvironment, machine: Machine, notices: Notices, environ: Mapping[str, str]
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
            return claim.standing_verdict(store, keys)
        except BadRecord:
            raise
        except StoreError:
            if clock() >= until:
                raise
            sleep(1.0)  # one on a disk says at once that it fails


def work(
    request: claim.Request, env: RunEnvironment, machine: Machine, notices: Notices, environ: Mapping[str, str]
) -> int:
    """The exit code of what there was to do."""
    # One request gives up well before the run does: that is said, and a newer checkpoint takes its turn.
    store = Store(env.bucket, Patience(deadline_s=min(Patience.deadline_s, env.patience_s / 4)))
    keys = Keys(claim.choose_run_id(env, machine, request))
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
        config_values.check_env(debt.run.config, keys.record(debt.run.revision), env.allow_env)
    run = debt.run if debt else read_or_create_run(store, keys, env, request)
    machine = Machine.read(environ, run.config.get("num_processes"))
    record = claim.claim_attempt(store, keys, machine, env.attempt, env.gpu_share)
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
