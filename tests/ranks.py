"""Worker processes for tests, forked from one that has imported TRL: 6 s of imports once, not once a process.

The parent of all ("nursery") imports and computes nothing, so that a fork of it is as good as a fresh
interpreter. ``python -m tests.ranks`` is its main program.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from spotune.core.protocol import (
    CANDIDATE,
    JOB,
    OUTPUT,
    RESTORED,
    VERDICT,
    WorkerJob,
    outcome_path,
    read_json,
    write_json,
)
from tests.waiting import POLL_S, until

HELD = "held"  # a file in the exchange folder while the rank stands still


class Nursery:
    """Starts ranks and TRL's own script as forks of one process."""

    def __init__(self, home: Path) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "1"}
        environ |= {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets")}  # read when imported, for all
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )

    def start(self, folder: Path, *, log: str = "log", kind: str = "rank", hold: str = "", **environ: str) -> int:
        """Starts a rank in the exchange folder; kind ``fsdp``: with FSDP on the CPU (tests/fsdp_on_cpu.py).

        With kind ``trl``: TRL's own script on ``folder/config.yaml``. ``hold``: rank 0 stands still once it has written
        an event with this text, until ``let_go``.
        """
        assert self._process.stdin
        assert self._process.stdout
        order = {"folder": str(folder), "log": str(folder / log), "kind": kind, "hold": hold, "environ": environ}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def run(self, folder: Path, world_size: int = 1, kind: str = "rank", **environ: str) -> list[dict[str, Any]]:
        """Runs all ranks to their end; returns their outcomes."""
        if world_size > 1:
            environ.setdefault("MASTER_PORT", free_port())
        for rank in range(world_size):
            self.start(folder, log=f"log-{rank}", kind=kind, **rank_environment(rank, world_size), **environ)
        return [wait_for(outcome_path(folder, rank), folder) for rank in range(world_size)]

    def close(self) -> None:
        assert self._process.stdin
        with self._process:  # closes both pipes and waits
            self._process.stdin.close()


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    if world_size == 1:
        return {}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for(path: Path, folder: Path) -> Any:
    """The JSON of a file that is to appear."""

    def why() -> str:
        logs = "\n".join(log.read_text()[-3000:] for log in folder.glob("log*"))
        return f"{path.name} did not appear\n{logs}"

    until(path.exists, why)
    return read_json(path)


def wait_until_held(folder: Path) -> None:
    """Returns when the rank that was started with ``hold`` stands still."""
    until(
        lambda: (folder / HELD).exists() or outcome_path(folder, 0).exists(),
        lambda: f"never held\n{log_text(folder)[-3000:]}",
    )
    assert (folder / HELD).exists(), log_text(folder)[-3000:]


def let_go(folder: Path) -> None:
    (folder / HELD).unlink()


def kill(pid: int) -> None:
    """As the kernel's out-of-memory killer does it; returns when the process is gone."""
    with suppress(ProcessLookupError):  # the other rank's end may have ended it
        os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())


def make_folder(folder: Path, config: dict[str, Any], **job: Any) -> Path:
    """An exchange folder for a fresh start."""
    folder.mkdir(parents=True)
    if not {"save_steps", "save_seconds"} & job.keys():
        job["save_as_config"] = "save_steps" in config or "save_strategy" in config
    settings = {"run_id": "test", "attempt": 1, "config_path": "config.yaml", "cache": str(folder.parent / "cache")}
    write_json(folder / JOB, WorkerJob(config=config, **(settings | job)))
    restore(folder)
    return folder


def restore(folder: Path, checkpoint: Path | None = None, tokens: int = 0, best: Path | None = None) -> None:
    found = {"checkpoint": checkpoint and str(checkpoint), "tokens": tokens, "error": None}
    write_json(folder / RESTORED, {**found, "best_checkpoint": best and str(best)})


def verdict_on(folder: Path, checkpoint: Path, number: int) -> str:
    """Asks a running rank 0 about a checkpoint, as the guard does; returns what is wrong with it."""
    candidate = {"number": number, "checkpoint": str(checkpoint), "best_checkpoint": None}
    write_json(folder / CANDIDATE, candidate)
    until(
        lambda: (read_json(folder / VERDICT) or {}).get("number") == number or outcome_path(folder, 0).exists(),
        lambda: f"no verdict\n{log_text(folder)[-3000:]}",
    )
    return str((read_json(folder / VERDICT) or {})["fault"])


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events-0.jsonl").read_text().splitlines()]
    return [line for line in lines if not kind or line["event"] == kind]


def log_text(folder: Path) -> str:
    """What the processes of a folder printed."""
    return "".join(log.read_text() for log in sorted(folder.glob("log*")))


def weights(folder: Path) -> dict[str, bytes]:
    """The result's tensors, as bytes."""
    from safetensors import safe_open

    (file,) = (folder / OUTPUT).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name).numpy().tobytes() for name in tensors.keys()}  # noqa: SIM118


def _write_down_rows(folder: Path) -> None:
    """Has this rank leave ``rows-<rank>.json``: step -> the rows, as their tokens, that it trained on."""
    from spotune.sft.trainer import SpotTrainer

    seen: dict[int, list[str]] = {}
    train = SpotTrainer.training_step

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        masks = inputs["attention_mask"] if "attention_mask" in inputs else [None] * len(inputs["input_ids"])
        for row, mask in zip(inputs["input_ids"], masks, strict=True):
            tokens = row if mask is None else row[mask.bool()]
            seen.setdefault(self.state.global_step + 1, []).append(str(tokens.tolist()))
        write_json(folder / f"rows-{os.environ.get('RANK', '0')}.json", seen)
        return train(self, model, inputs, *args, **kwargs)

    SpotTrainer.training_step = watched


def _hold_after(folder: Path, text: str) -> None:
    """Has rank 0 stand still once, after it has written an event with this text."""
    import time

    from spotune.core.protocol import EventLog

    write, held = EventLog.write, folder / HELD
    waited: list[str] = []

    def writing(self: Any, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        if not waited and text in json.dumps({"event": event, **fields}):
            waited.append(event)
            held.touch()
            while held.exists():
                time.sleep(POLL_S)

    EventLog.write = writing  # type: ignore[method-assign]


def _child(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(order["environ"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["kind"] == "trl":
        from trl.scripts.sft import main, make_parser

        try:
            main(*make_parser().parse_args_and_config(["--config", f"{order['folder']}/config.yaml"]))
        finally:
            sys.stdout.flush()
            write_json(Path(order["folder"], "done"), True)
        os._exit(0)
    from spotune.sft.worker import ignore_signals
    from spotune.sft.worker import main as work

    if order["kind"] == "fsdp":
        from tests import fsdp_on_cpu

        fsdp_on_cpu.apply()
    if order["kind"] == "watched":
        _write_down_rows(Path(order["folder"]))
    if order["hold"]:
        _hold_after(Path(order["folder"]), order["hold"])
    ignore_signals()
    work(["worker", order["folder"]])


def _serve() -> None:
    import peft  # noqa: F401
    import trl
    from transformers import PreTrainedTokenizerFast, Trainer  # noqa: F401

    import spotune.sft.trainer

    assert trl.SFTTrainer
    assert spotune.sft.trainer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _child(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
