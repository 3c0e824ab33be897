"""SIGTERM to plain TRL with ``enable_jit_checkpoint=True``: the exit code, what is left, and whether a resume works.

    .venv-train/bin/python benchmarks/jit.py [--kills 5] [--lanes 2] [--keep FOLDER]

``trl sft``'s own script trains LoRA on a tiny model on the CPU, slowed down to 2 s a step (SLOW_S in plain_trl.py).
Each run gets one SIGTERM, and SIGKILL after 30 s of grace. Then the same training is started again, with
``resume_from_checkpoint=True`` if there is a checkpoint. Its weights are compared with an undisturbed run's.
"""

import argparse
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random

import yaml

ROOT = Path(__file__).resolve().parents[1]
SLOW_S = 0.3
GRACE_S = 30.0
SENTINEL = "checkpoint-*/checkpoint-is-incomplete.txt"  # transformers' own, while it saves just in time


@dataclass(frozen=True)
class Instant:
    """When SIGTERM is sent, within SLOW_S after one of these events, and to what."""

    event: str
    counts: range  # of the event, from 1
    jit: bool = True
    dropout: float = 0.05  # TRL's default for LoRA
    ranks: int = 1
    rank: int = 0  # the one that gets the signal
    cut_short: bool = False  # SIGKILL in the middle of the just-in-time save


STEP_2 = range(5, 9)  # early enough that no regular save follows the just-in-time save
INSTANTS = {
    "in a micro-batch, without the option": Instant("batch", range(21, 25), jit=False),
    "before the first step": Instant("begin", range(1, 2)),
    "in a micro-batch": Instant("batch", STEP_2),
    "in a micro-batch, `lora_dropout: 0`": Instant("batch", STEP_2, dropout=0),
    "between micro-batches": Instant("between", range(4, 7)),
    "in a regular save": Instant("saving", range(1, 2)),
    "in a micro-batch; SIGKILL in its save": Instant("batch", STEP_2, cut_short=True),
    "in a micro-batch, to rank 0 of 2": Instant("batch", STEP_2, ranks=2, rank=0),
    "in a micro-batch, to rank 1 of 2": Instant("batch", STEP_2, ranks=2, rank=1),
}


@dataclass(frozen=True)
class Outcome:
    """What one SIGTERM came to."""

    codes: str
    seconds: float
    left: str
    result: bool  # the output folder holds weights, as after a finished training
    error: str  # the resume's last line; empty: it ended with 0
    same: bool


def make_material(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_model, rows, write_jsonl

    make_model(folder / "model")
    write_jsonl(folder / "data" / "train.jsonl", rows(400, "text"))


class Run:
    """One training in a folder of its own."""

    def __init__(self, material: Path, folder: Path, dropout: float, jit: bool, ranks: int) -> None:
        self._folder, self._ranks, self.output = folder, ranks, folder / "output"
        folder.mkdir(parents=True)
        self._config = {
            "model_name_or_path": str(material / "model"), "dataset_name": str(material / "data"),
            "output_dir": str(self.output), "use_peft": True, "lora_dropout": dropout,
            "lora_target_modules": ["all-linear"], "max_steps": 10, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4, "max_length": 64, "learning_rate": 1e-3, "save_steps": 5,
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "dataloader_pin_memory": False, "enable_jit_checkpoint": jit,
        }  # fmt: skip

    def start(self, slow_s: float = 0) -> list[subprocess.Popen[bytes]]:
        found = any(self.output.glob("checkpoint-*"))
        given = self._folder / "config.yaml"
        given.write_text(yaml.safe_dump(self._config | ({"resume_from_checkpoint": True} if found else {})))
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(self._folder / "hf")}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(self._ranks):
            if self._ranks > 1:
                environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(self._ranks)}
                environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, str(ROOT / "benchmarks" / "plain_trl.py"), str(given)]
            command += [str(self.times(rank)), str(slow_s)]
            with self.log(rank).open("w") as log:
                started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
        return started

    def times(self, rank: int) -> Path:
        return self._folder / f"times-{rank}.jsonl"

    def log(self, rank: int) -> Path:
        return self._folder / f"log-{rank}"

    def finish(self) -> str:
        """Trains to the end; returns the line that it died of, or nothing."""
        processes = self.start()
        if not any(end(processes, 300)):
            return ""
        lines = [line for line in self.log(0).read_text().splitlines() if line]
        error = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        return re.sub(r"checkpoint-\d+", "checkpoint-N", error.replace(str(self.output), "output_dir"))

    def weights(self) -> str:
        return hashlib.sha256((self.output / "adapter_model.safetensors").read_bytes()).hexdigest()


def end(processes: list[subprocess.Popen[bytes]], patience_s: float) -> list[int]:
    """The exit codes; SIGKILL for processes that still run after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
    return [process.wait() for process in processes]


def wait_for(processes: list[subprocess.Popen[bytes]], has_come: Callable[[], bool]) -> None:
    while not has_come():
        assert all(process.poll() is None for process in processes), "training ended before the instant came"
        time.sleep(0.002)


def strike(run: Run, instant: Instant, rng: Random) -> tuple[str, float]:
    """Trains until the instant and sends SIGTERM; returns exit codes and how long the process went on."""
    processes, count = run.start(SLOW_S), rng.choice(instant.counts)
    struck, events = processes[instant.rank], run.times(instant.rank)
    wait_for(processes, lambda: events.exists() and events.read_text().count(f'"{instant.event}"') >= count)
    time.sleep(rng.uniform(0, SLOW_S))
    sent = time.monotonic()
    struck.send_signal(signal.SIGTERM)
    if instant.cut_short:
        wait_for(processes, lambda: any(run.output.glob(SENTINEL)))
        time.sleep(rng.uniform(0, SLOW_S))
        struck.kill()
    codes = end(processes, GRACE_S)
    return " and ".join(map(str, codes)), time.monotonic() - sent


def play(place: Path, expected: dict[tuple[float, int], str], task: tuple[str, int]) -> Outcome:
    name, number = task
    instant = INSTANTS[name]
    run = Run(place, place / f"{name} {number}", instant.dropout, instant.jit, instant.ranks)
    codes, seconds = strike(run, instant, Random(f"{name} {number}"))
    left, result = newest(run.output), (run.output / "adapter_model.safetensors").exists()
    error = run.finish()
    same = not error and run.weights() == expected[instant.dropout, instant.ranks]
    outcome = Outcome(codes, seconds, left, result, error, same)
    print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    return outcome


def newest(output: Path) -> str:
    """The checkpoint that a resume takes, and whether it is whole."""
    folders = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not folders:
        return "none"
    files = {path.name for path in folders[-1].iterdir()}
    is_whole = "trainer_state.json" in files and "checkpoint-is-incomplete.txt" not in files
    return f"{folders[-1].name}{'' if is_whole else ', not whole'}"


def show(name: str, outcomes: list[Outcome]) -> str:
    cells = [
        name,
        str(len(outcomes)),
        counted(outcome.codes for outcome in outcomes),
        f"{min(outcome.seconds for outcome in outcomes):.1f} to {max(outcome.seconds for outcome in outcomes):.1f} s",
        counted(outcome.left for outcome in outcomes),
        str(sum(outcome.result for outcome in outcomes)),
        str(sum(bool(outcome.error) for outcome in outcomes)),
        str(sum(outcome.same for outcome in outcomes)),
    ]
    return f"| {' | '.join(cells)} |"


def counted(found: Iterable[str]) -> str:
    """The values, each with how often it came if there are several."""
    counts = Counter(found)
    return "; ".join(f"{what}: {count}" if len(counts) > 1 else what for what, count in sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    asked = parser.parse_args()
    instants = {name: instant for name, instant in INSTANTS.items() if asked.only in name}
    tasks = [(name, number) for name in instants for number in range(asked.kills)]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder:
        place = Path(folder)
        make_material(place)
        expected = {}
        for dropout, ranks in sorted({(instant.dropout, instant.ranks) for instant in instants.values()}):
            run = Run(place, place / f"undisturbed {dropout} {ranks}", dropout, jit=False, ranks=ranks)
            error = run.finish()
            assert not error, error
            expected[dropout, ranks] = run.weights()
        with ThreadPoolExecutor(asked.lanes) as lanes:
            outcomes = dict(zip(tasks, lanes.map(partial(play, place, expected), tasks), strict=True))
    print(", ".join(f"{package} {version(package)}" for package in ("transformers", "trl", "peft", "torch")))
    heads = ["SIGTERM", "kills", "exit code", "ended after", "newest checkpoint", "result left"]
    heads += ["resume died", "same weights"]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in instants:
        print(show(name, [outcomes[name, number] for number in range(asked.kills)]))
    errors = Counter(outcome.error.replace("[rank0]: ", "") for outcome in outcomes.values() if outcome.error)
    print("\nThe resumes died of:", *(f"- {count} times: `{error}`" for error, count in errors.items()), sep="\n")


if __name__ == "__main__":
    main()
