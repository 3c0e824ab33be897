"""The guard-worker protocol: the same requests to the real worker and to tests/fake_worker.py, and what they leave."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spotune.core.environment import FAILPOINT_DIR, FAILPOINTS
from spotune.core.protocol import CONTROL, OUTPUT, RESTORED, TRAINER, outcome_path, read_json, write_json
from spotune.guard.finish import weights_sha256
from spotune.guard.restore import missing_files
from tests import tiny
from tests.ranks import Nursery, events, free_port, make_folder, rank_environment, restore
from tests.script import FAKE_WORKER
from tests.waiting import LIMIT_S, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("worker contract")]
MAX_STEPS = 6
SAVE_STEPS = 3
Start = Callable[..., None]  # of a rank: folder, its log, its environment


@dataclass
class Left:
    """What the ranks of one attempt have left in their folder."""

    folder: Path
    outcomes: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events = events(self.folder)

    @property
    def order(self) -> list[tuple[str, Any]]:
        """Events in order, but for `written`, which comes whenever the disk is done, and Trainer's summary."""
        told = [one for one in self.events if one["event"] != "written" and "train_runtime" not in one]
        return [(one["event"], one.get("phase", one.get("step"))) for one in told]

    @property
    def fields(self) -> dict[str, set[str]]:
        """The fields of each kind of event; of a log only those that the guard and its readers know."""
        found: dict[str, set[str]] = {}
        for one in self.events:
            known = {"loss", "learning_rate", "step", "epoch"} if one["event"] == "log" else set(one)
            if "train_runtime" not in one:
                found.setdefault(one["event"], set()).update(known & set(one))
        return found

    @property
    def written(self) -> list[int]:
        return [one["step"] for one in self.events if one["event"] == "written"]

    @property
    def tokens(self) -> list[int]:
        return [one["tokens"] for one in self.events if one["event"] == "step"]

    @property
    def staged(self) -> dict[str, dict[str, Any]]:
        """What the ranks say of each checkpoint, as types where the worker is free, as values where it is not."""
        found = {}
        for path in sorted((self.folder / "staged").glob("*.json")):
            record = read_json(path)
            assert record["tokens"] > 0
            assert record["versions"]
            checkpoint = Path(record["checkpoint"]).relative_to(self.folder)
            fixed = {name: record[name] for name in ("step", "world_size", "best_step", "config_sha256")}
            types = {name: type(value).__name__ for name, value in record.items()}
            found[path.name] = types | fixed | {"checkpoint": str(checkpoint)}
        return found

    @property
    def checkpoints(self) -> dict[str, list[str]]:
        """By name: what the guard would miss, and the files that every checkpoint has, whatever the model."""
        found = {}
        for checkpoint in sorted((self.folder / TRAINER).glob("checkpoint-*")):
            names = {path.name for path in checkpoint.iterdir()}
            missing = [f"without {name}" for name in missing_files(names, len(self.outcomes))]
            own = [name for name in names if name.startswith(("rng_state", "spotune", "trainer_state", "scheduler"))]
            found[checkpoint.name] = [*missing, *sorted([*own, *(names & {"optimizer.pt"})])]
        return found

    @property
    def output(self) -> set[str]:
        names = {path.name for path in (self.folder / OUTPUT).glob("*")}
        if names:
            assert read_json(self.folder / OUTPUT / "trainer_state.json")["global_step"] == MAX_STEPS
        return names & {"model.safetensors", "config.json", "trainer_state.json"}

    @property
    def weights(self) -> str:
        return weights_sha256((self.folder / OUTPUT).glob("*.safetensors"))


class Director:
    """Plays the guard: makes folders, starts ranks, and asks for things at named instants."""

    def __init__(self, start: Start, place: Path, config: dict[str, Any]) -> None:
        self._start, self._place, self._config = start, place, config

    def folder(self, name: str, **job: Any) -> Path:
        return make_folder(self._place / name, self._config, **job)

    def run(self, folder: Path, world_size: int = 1, stop_at_first_save: bool = False) -> Left:
        """Runs all ranks to their end. Asked to stop while rank 0 saves, they take one step more."""
        held = folder / "failpoints"
        held.mkdir()
        port = free_port()
        for rank in range(world_size):
            environ = {**rank_environment(rank, world_size), "MASTER_PORT": port}
            if stop_at_first_save and rank == 0:
                environ |= {FAILPOINTS: "snapshot", FAILPOINT_DIR: str(held)}
            self._start(folder, f"log-{rank}", environ)
        if stop_at_first_save:
            until((held / "snapshot").exists, lambda: _logs(folder))
            write_json(folder / CONTROL, {"stop": True, "save": 0})
            (held / "snapshot").unlink()
        paths = [outcome_path(folder, rank) for rank in range(world_size)]
        until(lambda: all(path.exists() for path in paths), lambda: _logs(folder))
        return Left(folder, [read_json(path) for path in paths])

    def resume(self, name: str, before: Left, step: int, **job: Any) -> Left:
        """A new machine: only the staged checkpoint comes along."""
        folder = self.folder(name, attempt=2, **job)
        checkpoint = folder / TRAINER / f"checkpoint-{step}"
        shutil.copytree(before.folder / TRAINER / checkpoint.name, checkpoint)
        tokens = read_json(before.folder / "staged" / f"{step:08d}-0.json")["tokens"]
        restore(folder, checkpoint, tokens)
        return self.run(folder, len(before.outcomes))

    def play(self) -> dict[str, Left]:
        """The script of requests."""
        seen = {}
        seen["fresh start"] = self.run(self.folder("fresh", save_steps=SAVE_STEPS))
        seen["stopped"] = self.run(self.folder("stopped", save_steps=SAVE_STEPS), stop_at_first_save=True)
        seen["resumed"] = self.resume("resumed", seen["stopped"], 4, save_steps=SAVE_STEPS)
        seen["resumed at the end"] = self.resume("again", seen["fresh start"], MAX_STEPS, save_steps=SAVE_STEPS)
        asked = self.folder("asked")
        write_json(asked / CONTROL, {"stop": False, "save": 1})
        seen["asked to save"] = self.run(asked)
        early = self.folder("early")
        write_json(early / CONTROL, {"stop": True, "save": 0})
        seen["stopped before training"] = self.run(early)
        refused = self.folder("refused")
        write_json(refused / RESTORED, {"checkpoint": None, "tokens": 0, "error": "no", "best_checkpoint": None})
        seen["nothing restored"] = self.run(refused)
        broken = self.folder("broken")
        (broken / TRAINER / "checkpoint-1").mkdir(parents=True)
        (broken / TRAINER / "checkpoint-1" / "trainer_state.json").write_text("{}")
        restore(broken, broken / TRAINER / "checkpoint-1")
        seen["not a whole checkpoint"] = self.run(broken)
        seen["two ranks"] = self.run(self.folder("two", save_steps=SAVE_STEPS), 2)
        seen["two ranks stopped"] = self.run(self.folder("half", save_steps=SAVE_STEPS), 2, stop_at_first_save=True)
        seen["two ranks resumed"] = self.resume("whole", seen["two ranks stopped"], 4, save_steps=SAVE_STEPS)
        return seen


def _logs(folder: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in folder.glob("log*"))


SCENES = (
    *("fresh start", "stopped", "resumed", "resumed at the end", "asked to save", "stopped before training"),
    *("nothing restored", "not a whole checkpoint", "two ranks", "two ranks stopped", "two ranks resumed"),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("contract")
    tiny.make_model(folder / "model", dropout=0.1)
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(40))
    return {
        "model_name_or_path": str(folder / "model"),
        "data": [{"source": str(folder / "train.jsonl")}],
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-3,
        "logging_steps": 2,
        "max_length": 48,
        "bf16": False,
    }


@pytest.fixture(scope="module")
def real(ranks: Nursery, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Left]:
    def start(folder: Path, log: str, environ: dict[str, str]) -> None:
        ranks.start(folder, log=log, **environ)

    return Director(start, tmp_path_factory.mktemp("real"), config).play()


@pytest.fixture(scope="module")
def fake(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Left]:
    started = []

    def start(folder: Path, log: str, environ: dict[str, str]) -> None:
        with open(folder / log, "w") as file:
            command = [sys.executable, str(FAKE_WORKER), "spotune.sft.worker", str(folder)]
            started.append(subprocess.Popen(command, env={**os.environ, **environ}, stdout=file, stderr=file))

    seen = Director(start, tmp_path_factory.mktemp("fake"), config).play()
    for process in started:
        process.wait(LIMIT_S)
    return seen


@pytest.mark.parametrize("scene", SCENES)
def test_fake_and_real_worker_leave_the_same(real: dict[str, Left], fake: dict[str, Left], scene: str) -> None:
    one, other = real[scene], fake[scene]
    assert one.outcomes == other.outcomes
    assert one.order == other.order
    assert one.fields == other.fields
    assert one.written == other.written
    assert one.staged == other.staged
    assert one.checkpoints == other.checkpoints
    assert one.output == other.output


EXPECTED = {
    "fresh start": ("completed", MAX_STEPS),
    "stopped": ("stopped", 4),
    "resumed": ("completed", MAX_STEPS),
    "resumed at the end": ("completed", MAX_STEPS),
    "asked to save": ("completed", MAX_STEPS),
    "stopped before training": ("stopped", 0),
    "nothing restored": ("stopped", 0),
    "not a whole checkpoint": ("failed", 0),
    "two ranks": ("completed", MAX_STEPS),
    "two ranks stopped": ("stopped", 4),
    "two ranks resumed": ("completed", MAX_STEPS),
}


@pytest.mark.parametrize("worker", ["real", "fake"])
def test_what_is_asked_for_happens(request: pytest.FixtureRequest, worker: str) -> None:
    seen: dict[str, Left] = request.getfixturevalue(worker)
    for scene, (how, step) in EXPECTED.items():
        assert {(one["how"], one["step"]) for one in seen[scene].outcomes} == {(how, step)}, scene
    saves = {scene: left.written for scene, left in seen.items()}
    assert saves["fresh start"] == saves["two ranks"] == [SAVE_STEPS, MAX_STEPS]
    assert saves["stopped"] == saves["two ranks stopped"] == [SAVE_STEPS, 4]
    assert saves["asked to save"] == [1, MAX_STEPS]
    assert saves["resumed at the end"] == []
    whole = {left.folder.name: left.checkpoints for scene, left in seen.items() if EXPECTED[scene][0] != "failed"}
    assert not [name for files in whole.values() for names in files.values() for name in names if "without" in name]


@pytest.mark.parametrize("worker", ["real", "fake"])
def test_a_resumed_run_ends_bit_identical(request: pytest.FixtureRequest, worker: str) -> None:
    seen: dict[str, Left] = request.getfixturevalue(worker)
    whole = seen["fresh start"]
    assert seen["resumed"].weights == seen["resumed at the end"].weights == whole.weights
    assert seen["two ranks resumed"].weights == seen["two ranks"].weights
    for before, after in (("stopped", "resumed"), ("two ranks stopped", "two ranks resumed")):
        tokens = seen[before].tokens + seen[after].tokens
        assert tokens == sorted(set(tokens))  # they only grow
        assert len(tokens) == MAX_STEPS
    assert seen["stopped"].tokens + seen["resumed"].tokens == whole.tokens
