"""A worker without torch, for tests of the guard: the same protocol, the same files, weights that are a hash chain.

The guard starts it in place of ``python -m`` where ``SPOTUNE_WORKER`` names this file (guard/ranks.py). Step
``n`` turns the chain's state into sha256(state, n, learning rate, row), so two runs have the same weights only if they
took the same steps on the same data from the same model. What a test tells it, by the environment:

    FAKE_WORKER_DIR     a folder shared with the test; without it the worker runs freely
    DIR/steps           a number: the worker may take steps up to this one, then it waits; no file: no limit
    DIR/load            while this file exists, the worker stays in the phase `load`
    DIR/fault           {"step": n, "how": h}: once, before step n: h is `kill` (SIGKILL to itself), `failed`, `retry`,
                        `bad_input` (an outcome), `raise` (exit code 1 without a word), `diverge` (goes on, with a loss
                        and a result that are NaN)
    DIR/evaluate        a number: after this step the worker stays in the phase `eval` until the file is gone
    DIR/merge, push     what the next merges or pushes do: `hang`, or the text of an error; no file: they succeed
    DIR/asked           written by the worker: a merge or push has begun
    DIR/hub.json        in place of a hub: {repository: {"commits": [id], "files": [name]}}
"""

from spotune.sft.worker import die_with_parent, ignore_signals

if __name__ == "__main__":
    ignore_signals()

import hashlib
import json
import math
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from spotune.core.io import failpoint
from spotune.core.protocol import (
    CONTROL,
    EXTRAS,
    JOB,
    MERGE,
    MERGED,
    OUTPUT,
    RESTORED,
    TRAINER,
    Answer,
    Control,
    EventLog,
    ExtraJob,
    Job,
    Outcome,
    Staged,
    Wish,
    answer_candidate,
    answer_path,
    events_path,
    outcome_path,
    read_json,
    staged_path,
    write_json,
)

POLL_S = 0.01
TOKENS_PER_STEP = 16
BULK_BYTES = 1 << 16
VERSIONS = {"fake": "1"}


class Ended(Exception):
    """The rank ends here, with this outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Told:
    """What the test has told this worker."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder) if folder else None

    def wait_to_load(self) -> None:
        while self._folder and (self._folder / "load").exists():
            time.sleep(POLL_S)

    def wait_for(self, step: int) -> None:
        """Returns once the worker may take this step."""
        while self._folder and (text := _read(self._folder / "steps")) and int(text) < step:
            time.sleep(POLL_S)

    def evaluates_after(self, step: int) -> bool:
        return self._folder is not None and _read(self._folder / "evaluate") == str(step)

    def wait_to_evaluate(self, step: int) -> None:
        while self.evaluates_after(step):
            time.sleep(POLL_S)

    def fault(self, step: int) -> str:
        """How the worker is to fail before this step; empty for not at all."""
        path = self._folder / "fault" if self._folder else None
        told = json.loads((path and _read(path)) or "{}")
        if path is None or told.get("step") != step:
            return ""
        path.unlink()
        return str(told["how"])

    def extra(self, name: str) -> str:
        """What a merge or push is to do; returns once that is not to hang."""
        while (wanted := _read(self._folder / name) if self._folder else "") == "hang":
            time.sleep(POLL_S)
        return wanted

    def note(self, name: str) -> None:
        """Leaves an empty file for the test to see."""
        if self._folder:
            (self._folder / name).touch()

    @property
    def hub(self) -> Path | None:
        return self._folder and self._folder / "hub.json"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


class Peers:
    """The ranks of a job, over a socket to rank 0: what any rank wants, all do."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._links = rank, []
        if world_size == 1:
            return
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if rank == 0:
            with socket.create_server(place) as listener:
                self._links = [listener.accept()[0].makefile("rw") for _ in range(world_size - 1)]
        else:
            self._links = [_connect(place).makefile("rw")]

    def common(self, wish: Wish) -> Wish:
        """The union of all ranks' wishes. Raises ConnectionError where a rank is gone."""
        mine = [wish.stop, wish.save]
        if self._rank == 0:
            wishes = [mine, *(self._receive(link) for link in self._links)]
            mine = [any(column) for column in zip(*wishes, strict=True)]
            for link in self._links:
                self._send(link, mine)
        else:
            self._send(self._links[0], mine)
            mine = self._receive(self._links[0])
        return Wish(stop=mine[0], save=mine[1])

    def _send(self, link: Any, value: list[bool]) -> None:
        link.write(json.dumps(value) + "\n")
        link.flush()

    def _receive(self, link: Any) -> list[bool]:
        line = link.readline()
        if not line:
            raise ConnectionError("a rank is gone")
        found: list[bool] = json.loads(line)
        return found


def _connect(place: tuple[str, int]) -> socket.socket:
    while True:
        try:
            return socket.create_connection(place)
        except ConnectionRefusedError:
            time.sleep(POLL_S)


class FakeRank:
    """One rank of one attempt, from job.json to its outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.job = Job(**read_json(folder / JOB))
        self.config = self.job.config
        self.events = EventLog(events_path(folder, self.rank)) if self.rank == 0 else None
        self.told = Told(os.environ.get("FAKE_WORKER_DIR", ""))
        self.control = Control(folder)
        self.max_steps = int(self.config.get("max_steps") or 10)
        self.step, self.saved_step = 0, -1
        self.has_diverged = False
        self.state = b""
        self.rows: list[bytes] = []

    def run(self) -> Outcome:
        self._phase("load")
        self.told.wait_to_load()
        self._load()
        self._write("rows", set="training", max_length=None, sources=[])
        self._wait_for_restore()
        self.peers = Peers(self.rank, self.world_size)
        self._write("plan", max_steps=self.max_steps, num_train_epochs=1, trainable_parameters=1, total_parameters=1)
        self._phase("train")
        self._saved_at = time.monotonic()
        if self.peers.common(self.control.look()).stop:
            raise Ended(Outcome("stopped", self.step))
        while self.step < self.max_steps:
            self._take_step()
        self._phase("teardown")
        self._write_result()
        failpoint("result-written")
        return Outcome("completed", self.step)

    def _load(self) -> None:
        """The state before the first step: the base model's weights, the seed, and the rows of the data."""
        base = Path(str(self.config["model_name_or_path"]))
        weights = b"".join(path.read_bytes() for path in sorted(base.glob("*.safetensors")))
        self.state = hashlib.sha256(weights + str(self.config.get("seed", 42)).encode()).digest()
        for source in self.config.get("data") or [{"source": self.config["dataset_name"]}]:
            path = Path(str(source["source"]))
            files = [path] if path.is_file() else sorted(path.glob("**/*.jsonl"))
            self.rows += [line for file in files for line in file.read_bytes().splitlines()]

    def _wait_for_restore(self) -> None:
        if not (self.folder / RESTORED).exists():
            self._phase("restore")
        while (restored := read_json(self.folder / RESTORED)) is None:
            if (read_json(self.folder / CONTROL) or {}).get("stop"):
                raise Ended(Outcome("stopped", 0))
            if self.rank == 0:
                answer_candidate(self.folder, fault_of)
            time.sleep(POLL_S)
        if restored.get("error"):
            raise Ended(Outcome("stopped", 0))
        if restored.get("checkpoint"):
            self._resume(Path(restored["checkpoint"]))

    def _resume(self, checkpoint: Path) -> None:
        """Takes the state from a checkpoint whose files all belong to one step."""
        rng = f"rng_state_{self.rank}.pth" if self.world_size > 1 else "rng_state.pth"
        needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
        missing = [name for name in needed if not (checkpoint / name).exists()]
        if missing or not (checkpoint / rng).exists():
            what = ", ".join(missing) or "rng_state"
            raise Ended(Outcome("failed", 0, f"{checkpoint.name}: not a whole checkpoint, {what} is missing"))
        self.step = self.saved_step = json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"]
        self.state = (checkpoint / "optimizer.pt").read_bytes()
        parts = {(checkpoint / name).read_bytes() for name in ("scheduler.pt", rng)}
        if parts != {self.state} or self.state.hex() not in (checkpoint / "model.safetensors").read_text("latin-1"):
            raise Ended(Outcome("failed", 0, f"{checkpoint.name}: its files are of different steps"))

    def _take_step(self) -> None:
        step = self.step + 1
        self.told.wait_for(step)
        match self.told.fault(step):
            case "":
                pass
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                os._exit(1)
            case "diverge":
                self.has_diverged = True
            case how:
                raise Ended(Outcome(how, self.step, f"the test wants {how} before step {step}"))  # type: ignore[arg-type]
        row = self.rows[step % len(self.rows)]
        rate = str(self.config.get("learning_rate", "")).encode()
        self.state = hashlib.sha256(self.state + str(step).encode() + rate + row).digest()
        self.step = step
        self._write("step", step=step, tokens=step * TOKENS_PER_STEP, data_wait_s=0.0)
        if step % int(self.config.get("logging_steps") or 10) == 0:
            loss = math.nan if self.has_diverged else 1.0 / step
            self._write("log", loss=loss, learning_rate=1.0, step=step, epoch=step / self.max_steps)
        if self.told.evaluates_after(step):
            self._phase("eval")
            self.told.wait_to_evaluate(step)
            self._phase("train")
        self._decide()

    def _decide(self) -> None:
        """At the step's end: saves where it is due or asked for, and stops where that is asked for."""
        seen = self.control.look()
        wish = self.peers.common(Wish(seen.stop, seen.save or self._is_due()))
        if wish.stop or wish.save or self.step == self.max_steps:
            self._save()
            self.control.answered()
        if wish.stop and self.step < self.max_steps:
            raise Ended(Outcome("stopped", self.step))

    def _is_due(self) -> bool:
        job = self.job
        if job.save_as_config:
            return self.step % int(self.config.get("save_steps") or 500) == 0
        by_time = job.save_seconds is not None and time.monotonic() - self._saved_at >= job.save_seconds
        return by_time or (job.save_steps is not None and self.step % job.save_steps == 0)

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        began = time.monotonic()
        self._phase("save")
        checkpoint = self.folder / TRAINER / f"checkpoint-{self.step}"
        self._write("save", step=self.step, stall_s=0.0)
        failpoint("snapshot")
        checkpoint.mkdir(parents=True, exist_ok=True)
        rng = f"rng_state_{self.rank}.pth" if self.world_size > 1 else "rng_state.pth"
        if self.rank == 0:
            write_weights(checkpoint / "model.safetensors", self.state)
            for name in ("optimizer.pt", "scheduler.pt"):
                (checkpoint / name).write_bytes(self.state)
            self._write_trainer_state(checkpoint)
        (checkpoint / rng).write_bytes(self.state)
        extra = "spotune.json" if self.rank == 0 else f"spotune_{self.rank}.json"
        (checkpoint / extra).write_text(json.dumps({"tokens": self.step * TOKENS_PER_STEP}))
        failpoint("written")
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        self._write("written", step=self.step, write_s=round(time.monotonic() - began, 4), bytes=size)
        staged = Staged(
            step=self.step,
            checkpoint=str(checkpoint),
            epoch=self.step / self.max_steps,
            tokens=self.step * TOKENS_PER_STEP,
            world_size=self.world_size,
            threads=1,
            versions=VERSIONS,
            global_batch=self.world_size,
        )
        write_json(staged_path(self.folder, self.step, self.rank), staged)
        self.saved_step, self._saved_at = self.step, time.monotonic()
        self._phase("train")

    def _write_trainer_state(self, folder: Path) -> None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": self.step, "max_steps": self.max_steps}))

    def _write_result(self) -> None:
        if self.rank == 0:
            output = self.folder / OUTPUT
            output.mkdir(parents=True, exist_ok=True)
            write_weights(output / "model.safetensors", self.state, "F32" if self.has_diverged else "U8")
            (output / "config.json").write_text("{}")
            self._write_trainer_state(output)

    def _phase(self, phase: Any) -> None:
        if self.events:
            self.events.phase(phase)

    def _write(self, event: str, **fields: Any) -> None:
        if self.events:
            self.events.write(event, **fields)


def fault_of(checkpoint: Path, best: Path | None) -> str:
    """Refuses a checkpoint whose optimizer is ``poison``, as torch does one that wants to run code."""
    return "optimizer.pt: poison" if (checkpoint / "optimizer.pt").read_bytes() == b"poison" else ""


def write_weights(path: Path, state: bytes, dtype: str = "U8") -> None:
    """A safetensors file of one tensor; its metadata has the chain's state in hex, its bytes are made from it.

    As F32 it begins with a NaN.
    """
    bulk = hashlib.shake_256(state).digest(BULK_BYTES)
    bulk = bulk if dtype == "U8" else struct.pack("<f", math.nan) + bulk[4:]
    tensor = {
        "dtype": dtype,
        "shape": [BULK_BYTES if dtype == "U8" else BULK_BYTES // 4],
        "data_offsets": [0, BULK_BYTES],
    }
    header = json.dumps({"__metadata__": {"state": state.hex()}, "chain": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bulk)


def run_rank(folder: Path) -> int:
    """Runs one rank to its outcome; returns the exit code."""
    this = FakeRank(folder)
    try:
        outcome = this.run()
    except Ended as end:
        outcome = end.outcome
    except OSError as error:  # a rank is gone, or the disk is full
        outcome = Outcome("retry", this.step, str(error))
    write_json(outcome_path(folder, this.rank), outcome)
    return 0 if outcome.how in ("completed", "stopped") else 1


def run_extra(name: str, folder: Path) -> int:
    """Merges (a copy with another name) or pushes (to a file of the test's folder); leaves the answer."""
    job, told = ExtraJob(**read_json(folder / EXTRAS)), Told(os.environ.get("FAKE_WORKER_DIR", ""))
    told.note("asked")
    if error := told.extra(name):
        answer = Answer(False, error)
    else:
        answer = Answer(True, facts=_merge(folder) if name == MERGE else _push(told, job, folder / OUTPUT))
    write_json(answer_path(folder, name), answer)
    return 0 if answer.done else 1


def _merge(folder: Path) -> dict[str, str]:
    (folder / MERGED).mkdir(exist_ok=True)
    for path in (folder / OUTPUT).glob("*.safetensors"):
        (folder / MERGED / "model.safetensors").write_bytes(path.read_bytes())
    return {"check": "the same as base and adapter"}


def _push(told: Told, job: ExtraJob, output: Path) -> dict[str, str]:
    """As the hub has it: what is there already makes no second commit."""
    assert told.hub
    repos: dict[str, Any] = read_json(told.hub) or {}
    name, oid = str(job.config.get("hub_model_id") or job.run_id), hashlib.sha1(job.weights_sha256.encode()).hexdigest()
    repo = repos.setdefault(name, {"commits": [], "files": []})
    if oid not in repo["commits"]:
        repo["commits"].append(oid)
        repo["files"] = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
        write_json(told.hub, repos)
    return {"repo_id": name, "oid": oid, "url": f"fake://{name}"}


def main(arguments: list[str]) -> int:
    """Runs what the guard asks for: a module of the worker's side, by name."""
    die_with_parent(os.environ)
    module, *rest = arguments
    if module == "spotune.sft.worker":
        return run_rank(Path(rest[0]).absolute())
    if module == "spotune.sft.extras":
        return run_extra(rest[0], Path(rest[1]).absolute())
    raise SystemExit(f"{module}: nothing here stands in for it")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
