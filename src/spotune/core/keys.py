"""Run identity and the layout of the bucket: the one place that knows where anything is.

runs/<run_id>/run.json                              what was submitted; create-only
runs/<run_id>/revisions/<4d>.json                   what was changed since: the highest is in force; create-only
runs/<run_id>/code/                                 commit, and the diff when dirty
runs/<run_id>/attempts/<4d>/attempt.json            claims the attempt (the fence); create-only
runs/<run_id>/attempts/<4d>/events-<rank>-<n>.jsonl phase changes, steps, losses; never rewritten
runs/<run_id>/attempts/<4d>/stacks-<rank>.txt       what the ranks did when the watchdog ended it; create-only
runs/<run_id>/attempts/<4d>/bill.json               price row and paid interval; create-only
runs/<run_id>/lost/<start>-<end, epoch ms>.json     bill of a machine that went before it claimed; create-only
runs/<run_id>/progress.json                         latest step, phase, loss, heartbeat; overwritten
runs/<run_id>/checkpoints/<step 8d>-<attempt 4d>/   Trainer's checkpoint-N layout; never rewritten
runs/<run_id>/commits/<attempt 4d>-<step 8d>.json   the commit, create-only, last
runs/<run_id>/output/  output/completed.json        the result and its certificate
runs/<run_id>/merged/  merged/completed.json        the adapter merged into its base, where asked for; its certificate
runs/<run_id>/pushed.json                           the result is on the hub, where asked for; create-only
runs/<run_id>/paused.json failed.json cancelled.json
clusters/<name>-<launch>.json                       a dev cluster's paid spans; rewritten by the launcher as they grow
late/<run_id>                                       a bill was written after the run was certified; empty
"""

import re
from dataclasses import dataclass
from random import Random

from spotune.core.errors import InputError, shown
from spotune.core.fields import MOST, MOST_ATTEMPTS, MOST_STEPS, number_of

RUN_ID = re.compile(r"[a-z][a-z0-9-]{1,23}[a-z0-9]")
RUNS = "runs"
CLUSTERS = "clusters"
LATE = "late"


def check_run_id(run_id: str, where: str = "--name") -> str:
    """Returns ``run_id`` when it is one, else raises InputError."""
    if not RUN_ID.fullmatch(run_id):
        remedy = "3 to 25 of a-z, 0-9 and '-', a letter first, no '-' at the end"
        raise InputError(where, f"{shown(run_id)} is not a run id", remedy=remedy)
    return run_id


def new_run_id(name: str, rng: Random) -> str:
    """A run id from a config's name and a short random part, e.g. ``demo-orders-k3x9``."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = re.sub(r"^[^a-z]+", "", stem)[:20].rstrip("-") or "run"
    return f"{stem}-{''.join(rng.choices('abcdefghijkmnpqrstuvwxyz23456789', k=4))}"


@dataclass(frozen=True)
class Keys:
    """The keys of one run, relative to the bucket's root."""

    run_id: str

    @property
    def root(self) -> str:
        return f"{RUNS}/{self.run_id}"

    @property
    def run(self) -> str:
        return f"{self.root}/run.json"

    @property
    def revisions(self) -> str:
        return f"{self.root}/revisions"

    @property
    def code(self) -> str:
        return f"{self.root}/code"

    @property
    def progress(self) -> str:
        return f"{self.root}/progress.json"

    @property
    def attempts(self) -> str:
        return f"{self.root}/attempts"

    @property
    def commits(self) -> str:
        return f"{self.root}/commits"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def output(self) -> str:
        return f"{self.root}/output"

    @property
    def completed(self) -> str:
        return f"{self.output}/completed.json"

    @property
    def merged(self) -> str:
        return f"{self.root}/merged"

    @property
    def merge_completed(self) -> str:
        return f"{self.merged}/completed.json"

    @property
    def pushed(self) -> str:
        return f"{self.root}/pushed.json"

    @property
    def failed(self) -> str:
        return f"{self.root}/failed.json"

    @property
    def paused(self) -> str:
        return f"{self.root}/paused.json"

    @property
    def cancelled(self) -> str:
        return f"{self.root}/cancelled.json"

    def record(self, revision: int) -> str:
        """The record of that revision; 0 is the one that was submitted."""
        return self.revision(revision) if revision else self.run

    def revision(self, revision: int) -> str:
        return f"{self.revisions}/{revision:04d}.json"

    def attempt(self, attempt: int) -> str:
        return f"{self.attempts}/{attempt:04d}/attempt.json"

    def bill(self, attempt: int) -> str:
        return f"{self.attempts}/{attempt:04d}/bill.json"

    @property
    def late(self) -> str:
        return f"{LATE}/{self.run_id}"

    @property
    def lost(self) -> str:
        return f"{self.root}/lost"

    def lost_bill(self, started_at: float, ended_at: float) -> str:
        """Of a machine that was paid for in that time, epoch seconds, and never claimed an attempt."""
        return f"{self.lost}/{round(started_at * 1000)}-{round(ended_at * 1000)}.json"

    def events(self, attempt: int, rank: int, part: int) -> str:
        return f"{self.attempts}/{attempt:04d}/events-{rank}-{part}.jsonl"

    def stacks(self, attempt: int, rank: int) -> str:
        return f"{self.attempts}/{attempt:04d}/stacks-{rank}.txt"

    def checkpoint(self, step: int, attempt: int) -> str:
        return f"{self.checkpoints}/{step:08d}-{attempt:04d}"

    def commit(self, attempt: int, step: int) -> str:
        return f"{self.commits}/{attempt:04d}-{step:08d}.json"


def cluster_key(name: str, launched_at: float) -> str:
    """The record of the cluster of that name that came up then, epoch seconds."""
    return f"{CLUSTERS}/{name}-{int(launched_at)}.json"


def revision_of(key: str) -> int | None:
    """The number of a revision's key, None for any other key."""
    found = re.search(r"/revisions/([^/]+)\.json\Z", key)
    return number_of(found[1], 4, MOST) if found else None


def attempt_of(key: str) -> int | None:
    """The attempt number in a key below ``attempts/``, None for any other key."""
    found = re.search(r"/attempts/([^/]+)/", key)
    return attempt_number(found[1]) if found else None


def attempt_number(name: str) -> int | None:
    """The attempt that a folder of ``attempts/`` is named after, None for any other name."""
    return number_of(name, 4, MOST_ATTEMPTS)


def commit_of(key: str) -> tuple[int, int] | None:
    """(attempt, step) of a commit's key, None for any other key; the highest is the newest."""
    found = re.search(r"/commits/([^/-]+)-([^/-]+)\.json\Z", key)
    return _pair(found[1], found[2]) if found else None


def checkpoint_of(name: str) -> tuple[int, int] | None:
    """(attempt, step) that a folder of ``checkpoints/`` is named after, None for any other name."""
    step, _, attempt = name.partition("-")
    return _pair(attempt, step)


def _pair(attempt: str, step: str) -> tuple[int, int] | None:
    numbers = attempt_number(attempt), number_of(step, 8, MOST_STEPS)
    return None if numbers[0] is None or numbers[1] is None else (numbers[0], numbers[1])
