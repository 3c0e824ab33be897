"""One rank: ``python -m spotune.sft.worker FOLDER``, started by the guard."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core import protocol
from spotune.core.environment import GUARD_PID
from spotune.core.errors import InputError, OtherVersions, SpotuneError, protect_output
from spotune.core.fingerprint import changed_versions, installed_versions
from spotune.core.io import failpoint
from spotune.core.revisions import FLAG
from spotune.sft.preflight import NotFinite, Stopped, check, outcome_of

# A rank ignores the signals of a preemption, and dies with its guard. This runs before the heavy imports, so that a
# SIGTERM to the whole process tree never ends a rank before the guard has decided. Standard library only.

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGURG)


def ignore_signals() -> None:
    """Ignores and blocks the signals of a preemption here and in child processes: the guard decides what they mean.

    Ignoring alone is not enough: torch's DataLoader workers install a handler that ends them on SIGTERM. A blocked
    signal is never delivered, and children inherit the block.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)


def die_with_parent(environ: Mapping[str, str], period_s: float = 1.0) -> None:
    """Ends this process when its guard ends for any reason, and each process that it forks when this one ends.

    A DataLoader worker also watches its parent, but the one that it finds when it begins. If the parent is killed
    during the fork, that is process 1, and the worker would stay forever.
    """
    parent = int(environ.get(GUARD_PID) or os.getppid())
    _die_with(parent)

    def watch() -> None:  # for systems without prctl
        while os.getppid() == parent:
            time.sleep(period_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    forking: list[tuple[int, bool]] = []

    def note() -> None:
        forking[:] = [(os.getpid(), threading.current_thread() is threading.main_thread())]

    # Linux watches the thread that forked. Only the main thread ends together with its process.
    os.register_at_fork(before=note, after_in_child=lambda: _die_with(*forking[0]))


def _die_with(parent: int, by_signal: bool = True) -> None:
    if by_signal and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before this process could ask for the signal
        os.kill(os.getpid(), signal.SIGKILL)


# One rank, top to bottom: check, load, wait for the restore, train, save the result. It always leaves an outcome.

if __name__ == "__main__":
    ignore_signals()  # before anything else is imported


@dataclass
class Rank:
    folder: Path
    rank: int
    job: protocol.WorkerJob
    events: protocol.EventLog | None
    trainer: Any = None


def main(argv: list[str]) -> None:
    """Runs the rank and ends the process; never returns."""
    protect_output()
    die_with_parent(os.environ)
    folder = Path(argv[1]).absolute()
    rank = int(os.environ.get("RANK", "0"))
    write_stacks_when_asked(folder, rank)
    outcome = run(folder, rank)
    protocol.write_json(protocol.outcome_path(folder, rank), outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome.how in ("completed", "stopped") else 1)  # unwinding DataLoader workers takes seconds


def write_stacks_when_asked(folder: Path, rank: int) -> None:
    """Makes this process write its Python stacks on STACKS_SIGNAL, even while it hangs in a library."""
    with suppress(OSError):  # other writes report a full disk
        stacks = os.open(protocol.python_stacks_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(protocol.STACKS_SIGNAL, stacks, all_threads=True)  # which keeps it for the process's life


def run(folder: Path, rank: int) -> protocol.Outcome:
    step = 0
    try:
        events = protocol.EventLog(protocol.events_path(folder, rank)) if rank == 0 else None
        this = Rank(folder, rank, protocol.WorkerJob(**protocol.read_json(folder / protocol.JOB)), events)
        try:
            return _run(this)
        finally:
            if this.trainer is not None:
                step = this.trainer.state.global_step
                this.trainer.saver.settle()  # a checkpoint in memory is still good after a fault
    except BaseException as error:  # the outermost frame: the guard must learn of any fault
        outcome = outcome_of(error, step)
        if outcome.how in ("failed", "retry") and not isinstance(error, NotFinite):
            traceback.print_exception(error)
        return outcome


def _run(this: Rank) -> protocol.Outcome:
    if this.events:
        this.events.phase("load")
    # Libraries read these when they are imported. What the user set stays.
    os.environ.update({key: str(value) for key, value in (this.job.config.get("env") or {}).items()})
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if not os.environ.get("HF_HOME") and this.job.cache:
        os.environ.setdefault("HF_DATASETS_CACHE", this.job.cache)
    if not sys.stderr.isatty():  # in a log, bars are endless lines; Trainer's own lines show the progress
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    check(this.job.config, this.job.config_path)
    this.trainer = trainer = _load(this)
    trainer.train(resume_from_checkpoint=_wait_for_restore(this))
    if not trainer.state.global_step:  # Trainer only warns and would leave the base model as the result
        what = "not a single step could be made: the rows do not fill a batch, or none is left of a stream"
        raise InputError(this.job.config_path, what, key="data", remedy="more rows, or a greater max_length")
    from spotune.sft.trainer import save_result

    if this.events:
        this.events.phase("teardown")
    save_result(trainer, this.folder / protocol.OUTPUT, this.job)
    failpoint("result-written")
    return protocol.Outcome("completed", trainer.state.global_step)


def _load(this: Rank) -> Any:
    """Loads what does not need the checkpoint: libraries, model, tokenized data. Returns the trainer."""
    import torch
    import transformers

    from spotune.sft import arguments
    from spotune.sft.boundary import Boundary, Saver
    from spotune.sft.trainer import build_trainer

    # PEFT uses the old name. Users cannot change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if this.job.threads:
        torch.set_num_threads(this.job.threads)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each rank silently trains alone
    args = arguments.parse(this.job, this.folder, this.rank)
    if args.training.world_size != world_size:
        raise SpotuneError(f"{world_size} ranks were started, but Accelerate counts {args.training.world_size}")
    if this.rank == 0:
        for line in arguments.notices(this.job.config):
            print(line, file=sys.stderr)
    saver = Saver(this.folder, this.events, installed_versions())
    return build_trainer(args, this.job, Boundary(this.job, saver))


def _wait_for_restore(this: Rank) -> str | None:
    """Returns the restored checkpoint's folder, None for a fresh start. Raises Stopped if the guard asks for it."""
    from spotune.sft.checkpoint_files import fault_of
    from spotune.sft.trainer import prepare

    if this.events and not (this.folder / protocol.RESTORED).exists():
        this.events.phase("restore")
    while (restored := protocol.read_json(this.folder / protocol.RESTORED)) is None:
        if (protocol.read_json(this.folder / protocol.CONTROL) or {}).get("stop"):
            raise Stopped(0)
        if this.rank == 0:  # the others would find the same
            protocol.answer_candidate(this.folder, fault_of)
        time.sleep(0.02)
    if restored.get("error"):
        raise Stopped(0)
    check_versions(this.job, restored, installed_versions())
    return prepare(this.trainer, restored)


def check_versions(job: protocol.WorkerJob, restored: Mapping[str, Any], installed: Mapping[str, str]) -> None:
    """Raises OtherVersions if the checkpoint's libraries may order rows in another way; prints a line if allowed."""
    changed = changed_versions(restored.get("versions") or {}, installed)
    if not changed:
        return
    if not restored.get("other_versions_allowed"):
        remedy = f"install those that it was made with, or spotune resume {job.run_id} {FLAG}"
        raise OtherVersions(job.config_path, changed, remedy)
    if os.environ.get("RANK", "0") == "0":
        print(f"[spotune] rows may come in another order from here on: {', '.join(changed)}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("command line: needs the exchange folder (python -m spotune.sft.worker FOLDER)")
    main(sys.argv)
