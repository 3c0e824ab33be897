"""The guard of every node but the first: does what the leader says, and uploads its own ranks' files."""

import argparse
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from spotune.core import config_keys, errors, protocol
from spotune.core.config import parse_flags
from spotune.core.environment import NUM_PROCESSES, OWN_STEP, RunEnvironment
from spotune.core.errors import BadRecord, InputError, SpotuneError, StoreError, protect_output
from spotune.core.io import failpoint
from spotune.core.keys import Keys, clock_fault
from spotune.core.protocol import Staged
from spotune.core.records import Commit
from spotune.core.revisions import FLAG
from spotune.core.store import Patience, Store
from spotune.guard import claim
from spotune.guard.attempt import Attempt
from spotune.guard.checkpoints import Handover, Uploader, drop_older, seal, upload_checkpoint
from spotune.guard.claim import read_or_create_run
from spotune.guard.extras import debt_of, finish_owed
from spotune.guard.journal import Context, Machine, say
from spotune.guard.leaving import Notices, departure, stay_until_killed
from spotune.guard.multinode import Line, gang_token, join
from spotune.guard.notice_sources import Watcher, sources_for
from spotune.guard.ranks import Ranks, collect_stacks, upload_stacks, work_of
from spotune.guard.restore import BadCheckpoint, download_checkpoint

POLL_S = 0.1
END_S = 900.0  # the leader uploads and certifies the result after the ranks have ended


class Follower:
    """One node's part of an attempt; ``run`` returns the exit code that the leader says."""

    def __init__(self, store: Store, keys: Keys, machine: Machine, scratch: Path, notices: Notices) -> None:
        self.store, self.keys, self.machine, self.notices = store, keys, machine, notices
        self.scratch = scratch

    def run(self, environ: Mapping[str, str]) -> int:
        token = gang_token(self.keys.run_id, environ.get("SKYPILOT_TASK_ID", ""))
        line, job, welcome = join(self.keys.run_id, self.machine, token)
        shutil.rmtree(self.scratch, ignore_errors=True)
        folder = self.scratch / f"{job.attempt:04d}"
        (folder / protocol.STAGED).mkdir(parents=True)
        say(f"node {self.machine.node_rank} follows attempt {job.attempt}")
        protocol.write_json(folder / protocol.JOB, job)
        protocol.write_json(folder / protocol.CONTROL, {"stop": False, "save": 0})
        machine = Machine.read(environ, job.config.get("num_processes"))
        ranks = Ranks(folder, machine, welcome.master_port, {**environ, **welcome.environ})
        try:
            return self._watch(line, ranks, folder, job.attempt, welcome.sample_s or math.inf)
        finally:
            ranks.kill()
            line.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, line: Line, ranks: Ranks, folder: Path, attempt: int, sample_s: float) -> int:
        handover, told, ended_at = Handover(folder, self.machine.ranks), False, 0.0
        uploader = Uploader(lambda staged: self._send_part(line, folder, attempt, staged))
        wanted, sampled_at = 0, time.monotonic()
        restored: dict[str, Any] = {}
        while True:
            message = line.next(POLL_S)
            if message is None and line.gone and line.inbox.empty():
                say("the leader is gone")
                return errors.PREEMPTED
            if message and "fetch" in message:
                restored = self._fetch(message, folder)
            if message and "resume" in message:
                protocol.write_json(folder / protocol.RESTORED, restored)
            if message and "upload" in message:
                wanted = message["upload"]
            if message and "stacks" in message:
                self._start_stacks(line, ranks, folder, attempt)
            if time.monotonic() - sampled_at >= sample_s and (work := work_of(set(ranks.pids.values()))):
                sampled_at = time.monotonic()
                line.send(work=vars(work))
            if message and "end" in message:
                return int(message["end"])
            if self.notices.given and not told:
                told = True
                line.send(notice=self.notices.source, left_s=self.notices.left_s)
            has_ended = not ranks.running
            handover.take()
            if staged := next((staged for staged in handover.taken if staged.step == wanted), None):
                wanted = 0
                uploader.submit(staged)
            if has_ended and not ended_at:
                ended_at = time.monotonic()
                line.send(ended=vars(ranks.outcome()))
            elif ended_at and time.monotonic() - ended_at > END_S:
                raise StoreError("the leader did not say how the attempt ended")

    def _start_stacks(self, line: Line, ranks: Ranks, folder: Path, attempt: int) -> None:
        """Uploads the stacks of this node's ranks, in a thread: a bucket that hangs must not keep us from the end."""

        def send() -> None:
            pids = ranks.pids
            collect_stacks(folder, pids)
            upload_stacks(self.store, self.keys, attempt, folder)
            line.send(stacks=list(pids))

        threading.Thread(target=send, name="stacks", daemon=True).start()

    def _send_part(self, line: Line, folder: Path, attempt: int, staged: Staged) -> None:
        """Uploads this machine's files of a checkpoint, and says so; the leader commits."""
        whole = seal(folder, staged, "")
        upload_checkpoint(self.store, self.keys, whole, attempt)
        line.send(part=whole.step, files=whole.files)
        drop_older(folder / protocol.TRAINER, whole)

    def _fetch(self, message: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Returns what this node's ranks are to restore: the leader's commits, from the bucket.

        A fault ends these ranks, and so the attempt. They are told once the leader's rank could load the checkpoint.
        """
        found: dict[str, Any] = {
            "checkpoint": None,
            "best_checkpoint": None,
            "tokens": message["tokens"],
            "error": None,
            "versions": {},
            "other_versions_allowed": message.get("other_versions_allowed", False),
            "global_batch": 0,
        }
        try:
            for name, key in (("checkpoint", message["fetch"]), ("best_checkpoint", message.get("best"))):
                if key:
                    commit = Commit.from_bytes(self.store.read(key) or b"", key)
                    if name == "checkpoint":
                        found |= {"versions": commit.versions, "global_batch": commit.global_batch}
                    found[name] = str(download_checkpoint(self.store, self.keys, commit, folder / protocol.TRAINER))
        except (BadCheckpoint, SpotuneError, OSError) as error:
            found["error"] = str(error)
        return found


# ``python -m spotune.sft CONFIG``: from the command line to an attempt, and to the exit code.

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
        return errors.FAILED if managed_job(os.environ) and not notices.given else error.exit_code
    except SpotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, MemoryError) as error:  # of this machine, before an attempt could record it
        return fail_here(f"{type(error).__name__}: {error}", notices, os.environ)


def fail_here(what: str, notices: Notices, environ: Mapping[str, str]) -> int:
    """Says a fault of this machine before an attempt is claimed; returns the exit code that leads to another one."""
    print(f"this machine: {what}", file=sys.stderr)
    return errors.FAILED if managed_job(environ) and not notices.given else errors.PREEMPTED


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
        config_keys.FLAG, action="append", default=[], metavar="NAME", help="let CONFIG's env: set NAME"
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
    if code == errors.PREEMPTED and (notice := notices.notice):
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
    debt = debt_of(store, keys) if verdict == errors.SUCCEEDED and not machine.node_rank else None
    if verdict is not None and debt is None:
        return verdict
    if notices.given:
        return errors.PREEMPTED
    scratch = env.home / "work" / keys.run_id / f"node-{machine.node_rank}"
    if machine.node_rank:
        return Follower(store, keys, machine, scratch, notices).run(environ)
    if debt:
        config_keys.check_env(debt.run.config, keys.record(debt.run.revision), env.allow_env)
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
