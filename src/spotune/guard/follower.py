"""The guard of every node but the first: does what the leader says, and uploads its own ranks' files."""

import math
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.core import exits, protocol
from spotune.core.errors import SpotuneError, StoreError
from spotune.core.keys import Keys
from spotune.core.protocol import Staged
from spotune.core.records import Commit
from spotune.core.store import Store
from spotune.guard.checkpoints import Handover, Uploader, drop_older, seal, upload_checkpoint
from spotune.guard.context import Machine
from spotune.guard.journal import say
from spotune.guard.leaving import Notices
from spotune.guard.multinode import Line, gang_token, join
from spotune.guard.ranks import Ranks, work_of
from spotune.guard.restore import BadCheckpoint, download_checkpoint
from spotune.guard.stacks import collect_stacks, upload_stacks

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
                return exits.PREEMPTED
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
