"""``python -m spotune.sft CONFIG``: from the command line to an attempt, or to a follower's part, and the exit code."""

import argparse
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
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
from spotune.core.store import RetryPolicy, Store
from spotune.guard import claim
from spotune.guard.attempt import Attempt
from spotune.guard.checkpoints import StagingFolder, Uploader, drop_older, seal, upload_checkpoint
from spotune.guard.claim import read_or_create_run
from spotune.guard.extras import finish_extras, pending_extras
from spotune.guard.journal import Clock, Context, Node, Sleep, count_devices, log
from spotune.guard.leaving import Notices, departure, stay_until_killed
from spotune.guard.multinode import Line, job_token, join
from spotune.guard.notice_sources import NoticeWatcher, sources_for
from spotune.guard.ranks import Ranks, collect_stacks, upload_stacks, work_of
from spotune.guard.restore import BadCheckpoint, download_checkpoint

END_S = 900.0  # the leader uploads and certifies the result after the ranks have ended
UNBOUND = "--cpu-bind=none"
USAGE = "python -m spotune.sft CONFIG [--profile P] [--set key=value]... [--allow-config-change]"
USAGE += " [--allow-env NAME]... [TRL's own flags]"


class Follower:
    """The part of an attempt on a node other than the first: follows the leader and uploads its own ranks' files."""

    def __init__(self, store: Store, keys: Keys, machine: Node, scratch: Path, notices: Notices) -> None:
        self.store, self.keys, self.machine, self.scratch, self.notices = store, keys, machine, scratch, notices

    def run(self, environ: Mapping[str, str]) -> int:
        """Returns the exit code that the leader sends."""
        line, job, welcome = join(self.keys.run_id, self.machine, job_token(self.keys.run_id, environ))
        shutil.rmtree(self.scratch, ignore_errors=True)
        folder = self.scratch / f"{job.attempt:04d}"
        (folder / protocol.STAGED).mkdir(parents=True)
        log(f"node {self.machine.node_rank} follows attempt {job.attempt}")
        protocol.write_json(folder / protocol.JOB, job)
        protocol.write_json(folder / protocol.CONTROL, {"stop": False, "save": 0})
        machine = Node.read(environ, job.config.get("num_processes"))
        ranks = Ranks(folder, machine, welcome.master_port, {**environ, **welcome.environ})
        try:
            return self._watch(line, ranks, folder, job.attempt, welcome.sample_s or math.inf)
        finally:
            ranks.kill()
            line.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, line: Line, ranks: Ranks, folder: Path, attempt: int, sample_s: float) -> int:
        staging, is_notice_sent, ended_at = StagingFolder(folder, self.machine.ranks), False, 0.0
        uploader = Uploader(lambda staged: self._send_part(line, folder, attempt, staged))
        wanted, sampled_at = 0, time.monotonic()
        restored: dict[str, Any] = {}

        def send_stacks() -> None:
            collect_stacks(folder, ranks.pids)
            upload_stacks(self.store, self.keys, attempt, folder)
            line.send(stacks=list(ranks.pids))

        while True:
            message = line.next(0.1)
            if message is None and line.gone and line.inbox.empty():
                log("the leader is gone")
                return errors.PREEMPTED
            if message and "fetch" in message:
                restored = self._fetch(message, folder)
            if message and "resume" in message:
                protocol.write_json(folder / protocol.RESTORED, restored)
            if message and "upload" in message:
                wanted = message["upload"]
            if message and "stacks" in message:
                # In a thread: a bucket that hangs must not delay the end.
                threading.Thread(target=send_stacks, name="stacks", daemon=True).start()
            if time.monotonic() - sampled_at >= sample_s and (work := work_of(set(ranks.pids.values()))):
                sampled_at = time.monotonic()
                line.send(work=vars(work))
            if message and "end" in message:
                return int(message["end"])
            if self.notices.given and not is_notice_sent:
                is_notice_sent = True
                line.send(notice=self.notices.source, left_s=self.notices.left_s)
            has_ended = not ranks.running
            staging.collect()
            if staged := next((staged for staged in staging.collected if staged.step == wanted), None):
                wanted = 0
                uploader.submit(staged)
            if has_ended and not ended_at:
                ended_at = time.monotonic()
                line.send(ended=vars(ranks.outcome()))
            elif ended_at and time.monotonic() - ended_at > END_S:
                raise StoreError("the leader did not say how the attempt ended")

    def _send_part(self, line: Line, folder: Path, attempt: int, staged: Staged) -> None:
        """Uploads this machine's files of a checkpoint and reports them; the leader commits."""
        whole = seal(folder, staged, "")
        upload_checkpoint(self.store, self.keys, whole, attempt)
        line.send(part=whole.step, files=whole.files)
        drop_older(folder / protocol.TRAINER, whole)

    def _fetch(self, message: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Downloads the leader's commits; returns what this node's ranks restore, or the error that ends them."""
        found: dict[str, Any] = {"checkpoint": None, "best_checkpoint": None, "error": None, "versions": {}}
        found |= {"tokens": message["tokens"], "global_batch": 0}
        found["other_versions_allowed"] = message.get("other_versions_allowed", False)
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


def enter_srun_step(argv: list[str], environ: Mapping[str, str]) -> None:
    """Replaces this process by the same command in a Slurm step of its own; returns if that is not needed or fails.

    Slurm signals only the first process of each step: SkyPilot's executor, or a batch script, which dies with all
    processes below it. In its own step, which shares the job's resources, the guard gets the notice.
    """
    if not wants_step(environ, os.getpid()) or not shutil.which("srun"):
        return
    step, job = srun_command(environ, socket.gethostname()), environ["SLURM_JOB_ID"]
    try:  # first without the run: a step that fails must not look like a run that fails. Slurm may be busy: 60 s
        probe = subprocess.run([*step, "true"], capture_output=True, text=True, timeout=60, check=False)
        printed = " ".join(probe.stderr.split())
        fault = "" if probe.returncode == 0 else printed or f"srun ended with exit code {probe.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        printed = fault = str(error)
    if fault:
        log(f"no step of its own in Slurm job {job}, notices may not arrive: {fault}")
        return
    if "lacks support for cpu binding" in printed:
        step.remove(UNBOUND)
    log(f"in a step of its own in Slurm job {job}, so that notices arrive")
    os.execvpe("srun", [*step, sys.executable, "-m", "spotune.sft", *argv], {**environ, OWN_STEP: job})


def wants_step(environ: Mapping[str, str], pid: int) -> bool:
    """Returns whether process ``pid`` is in a Slurm job, but not the first process of a step.

    False on a SkyPilot dev cluster: several tasks may share a node there, a new step could get another task's GPU, and
    nobody would recover the task.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job or environ.get(OWN_STEP) == job or environ.get("SLURM_TASK_PID") == str(pid):
        return False
    return bool(environ.get("SKYPILOT_MANAGED_JOB_ID")) or not environ.get("SKYPILOT_CLUSTER_INFO")


def srun_command(environ: Mapping[str, str], host: str) -> list[str]:
    """Returns the command prefix for a step on this node with all that the job has here."""
    node = environ.get("SLURMD_NODENAME") or host.split(".", 1)[0]
    # SkyPilot ends steps of this name when the task is cancelled.
    task = environ.get("SKYPILOT_INTERNAL_JOB_ID", "")
    command = ["srun", "--overlap", f"--jobid={environ['SLURM_JOB_ID']}", "--nodes=1", "--ntasks=1"]
    command += [f"--nodelist={node}", f"--job-name={f'sky-{task}' if task else 'spotune'}"]
    if gpus := count_devices(environ.get("CUDA_VISIBLE_DEVICES", "")):
        command.append(f"--gres=gpu:{gpus}")
    # A step has all of the job's CPUs, but its first process would be bound to one of them.
    command += [UNBOUND, "--mem=0"]
    return [*command, "--export=ALL", "--input=none", "--unbuffered", "--quiet"]


def main(argv: list[str]) -> int:
    """Runs one attempt; returns the exit code of the contract (0, 1, 2, 75 or 76)."""
    protect_output()
    enter_srun_step(argv, os.environ)
    notices = Notices().install()
    try:
        if fault := clock_fault(time.time()):
            return fail_here(fault, notices, os.environ)
        return run_attempt(parse_arguments(argv), notices, os.environ)
    except InputError as error:
        log(str(error), bare=True)
        bar_restarts(error, os.environ)
        return error.exit_code
    except SpotuneError as error:
        log(str(error), bare=True)
        # A StoreError before the claim: nobody could count it as a failed attempt.
        is_final = isinstance(error, StoreError) and managed_job(os.environ) and not notices.given
        return errors.FAILED if is_final else error.exit_code
    except (OSError, MemoryError) as error:  # this machine's, before an attempt could record it
        return fail_here(f"{type(error).__name__}: {error}", notices, os.environ)


def fail_here(what: str, notices: Notices, environ: Mapping[str, str]) -> int:
    """Logs a fault of this machine before the claim; returns the exit code that leads to another machine."""
    log(f"this machine: {what}", bare=True)
    return errors.FAILED if managed_job(environ) and not notices.given else errors.PREEMPTED


def bar_restarts(error: InputError, environ: Mapping[str, str]) -> None:
    """Marks a managed job as failed for bad input before the claim: its next machine would find the same."""
    with suppress(SpotuneError):
        env, machine = RunEnvironment.read(environ), managed_job(environ)
        if machine:
            keys, reason = Keys(claim.choose_run_id(env, machine, claim.RunRequest("", "", ()))), "; ".join(error.lines)
            claim.leave_mark(Store(env.bucket), keys.failed, keys.run_id, 0, reason=reason, exit_code=error.exit_code)


def managed_job(environ: Mapping[str, str]) -> Node | None:
    """Returns this machine if it is a managed job's: SkyPilot restarts it without end after 75, rarely after errors."""
    machine = Node.read({name: value for name, value in environ.items() if name != NUM_PROCESSES})
    return machine if machine.job_id else None


def parse_arguments(argv: list[str]) -> claim.RunRequest:
    """Parses CONFIG, --profile, --set and our flags; every other flag is TRL's own and becomes an override."""
    parser = argparse.ArgumentParser(prog="python -m spotune.sft", usage=USAGE, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="", metavar="CONFIG", help="as `trl sft` takes it")
    parser.add_argument("--profile", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(FLAG, action="store_true", help="follow CONFIG though the run began with another one")
    parser.add_argument(config_keys.FLAG, action="append", default=[], metavar="NAME", help="env: may set NAME")
    # CONFIG is the first word or --config's value; a later bare word is the value of the flag before it.
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    try:
        known, flags = parser.parse_known_args(argv[len(named) :])
    except argparse.ArgumentError as error:
        raise InputError("command line", str(error), remedy=USAGE) from error
    path, overrides = (named or [known.config])[0], (*parse_flags(flags), *known.sets)
    return claim.RunRequest(path, known.profile, overrides, known.allow_config_change, tuple(known.allow_env))


def run_attempt(request: claim.RunRequest, notices: Notices, environ: Mapping[str, str]) -> int:
    """Runs one attempt while watching for notices, leaves the machine as its infra requires; returns the exit code."""
    env, machine = RunEnvironment.read(environ), Node.read(environ)
    env = replace(env, allow_env=(*env.allow_env, *request.allow_env))
    notices.infra, notices.user_grace_s = machine.infra, env.grace_s
    with NoticeWatcher(sources_for(machine.infra, environ), notices):
        code = work(request, env, machine, notices, environ)
        if code == errors.PREEMPTED and (notice := notices.notice):
            stays, why = departure(machine.infra, notice.source, bool(machine.job_id), notices.left_s)
            log(f"{'staying until killed' if stays else 'leaving'}: {why}")
            if stays:
                stay_until_killed(notice.deadline)
        return code


def read_verdict(
    store: Store, keys: Keys, patience_s: float, clock: Clock = time.monotonic, sleep: Sleep = time.sleep
) -> int | None:
    """Returns the run's verdict; retries for ``patience_s`` while the store does not answer."""
    until = clock() + patience_s
    while True:
        try:
            return claim.standing_verdict(store, keys)
        except StoreError as error:
            if isinstance(error, BadRecord) or clock() >= until:
                raise
            sleep(1.0)  # a store on a disk fails at once


def work(
    request: claim.RunRequest, env: RunEnvironment, machine: Node, notices: Notices, environ: Mapping[str, str]
) -> int:
    """Does what the run needs from this machine; returns the exit code."""
    # One request gives up well before the run does: the error is logged, and a newer checkpoint takes its turn.
    store = Store(env.bucket, RetryPolicy(deadline_s=min(RetryPolicy.deadline_s, env.patience_s / 4)))
    keys = Keys(claim.choose_run_id(env, machine, request))
    # An outage of minutes would cost a managed job a machine; a run by hand has somebody at a terminal.
    verdict = read_verdict(store, keys, min(300.0, env.patience_s / 4) if machine.job_id else 0.0)
    pending = pending_extras(store, keys) if verdict == errors.SUCCEEDED and not machine.node_rank else None
    if verdict is not None and pending is None:
        return verdict
    if notices.given:
        return errors.PREEMPTED
    scratch = env.home / "work" / keys.run_id / f"node-{machine.node_rank}"
    if machine.node_rank:
        return Follower(store, keys, machine, scratch, notices).run(environ)
    if pending:
        run = pending[0]
        config_keys.check_env(run.config, keys.record(run.revision), env.allow_env)
    else:
        run = read_or_create_run(store, keys, env, request)
    machine = Node.read(environ, run.config.get("num_processes"))
    record = claim.claim_attempt(store, keys, machine, env.attempt, env.gpu_share)
    failpoint("claimed")
    allows = request.allow_config_change or env.allow_config_change
    context = Context(
        store, keys, run, record, machine, environ, scratch, env.cache, env.status_file, env.patience_s, allows
    )
    return finish_extras(context, notices, pending[1]) if pending else Attempt(context, notices).run()
