"""What the chaos tests play with: a run of seconds that has everything in it that could be lost.

``SPOTUNE_CHAOS_SEED`` draws other schedules than those of every day.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
import yaml

from drill.game import Game
from drill.schedule import Run
from drill.scorecard import score, table
from drill.servers import Bucket
from drill.show import Board
from drill.spotrun import SpotRun, run_id_of
from drill.timeline import Measure
from tests import conftest
from tests.tiny import make_model, rows, write_jsonl

SEED = int(os.environ.get("SPOTUNE_CHAOS_SEED", "20261124"))
KEEP = 2
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "lora_target_modules": ["all-linear"]}
BASE = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-3,
    "packing": True,
    "max_length": 64,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "save_steps": 3,
    "save_total_limit": KEEP,
    "eval_strategy": "steps",
    "eval_steps": 5,  # now and then together with a save, mostly between
    "dataloader_num_workers": 1,
    "report_to": "none",
}


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, data to train on and to evaluate on, and the configs ``lora.yaml`` and ``full.yaml``."""
    folder = tmp_path_factory.mktemp("material")
    model = make_model(folder / "model", dropout=0.1)
    write_jsonl(folder / "data" / "train.jsonl", rows(360))
    write_jsonl(folder / "data" / "test.jsonl", rows(16, seed=1))
    base = {"model_name_or_path": str(model), "dataset_name": str(folder / "data"), **BASE}
    (folder / "full.yaml").write_text(yaml.safe_dump(base))
    (folder / "lora.yaml").write_text(yaml.safe_dump(base | LORA))
    return folder


class Ground:
    """One config on one kind of store: the undisturbed run, made once, and runs under schedules."""

    def __init__(self, config: Path, bucket: Bucket, folder: Path, seed: int) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(conftest.FOREIGN)}
        environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environ.pop("HF_HOME", None)  # caches are on the machine's disk, and lost with it
        part = uuid4().hex[:6]

        def make(name: str) -> SpotRun:
            return SpotRun(run_id_of("chaos", part, name), [str(config)], bucket, environ)

        self._game = Game(make, folder, Board(f"{config.stem} {bucket.url.partition(':')[0]}"))
        self.measure: Measure = self._game.undisturbed()
        self.rng = Random(seed)

    def play(self, runs: list[Run]) -> dict[str, Any]:
        """Plays the runs; returns the scorecard once nothing in it is as it must not be."""
        card = score("spotune", self._game.play(runs, self.measure), self.measure)
        print(f"\n{table([card])}")
        bad = [row for row in card["per_run"] if not (row["bit_identical"] and row["first_try"])]
        assert not bad, f"seed {SEED}: {bad}\n{Path(bad[0]['log']).read_text()[-6000:]}"
        assert card["bit_identical"] == card["first_try"] == card["runs"]
        assert card["repairs"] == card["checkpoints_rejected"] == 0
        assert "commits without data" not in card["leftovers"]
        return card


@pytest.fixture(scope="module")
def ground(
    request: pytest.FixtureRequest, material: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Ground]]:
    """Makes the ground for a config and a kind of store."""
    with pytest.MonkeyPatch.context() as patch:

        def make(config: str, scheme: str) -> Ground:
            conftest.reach(scheme, request, patch)
            folder = tmp_path_factory.mktemp(f"{config}-{scheme}")
            url = f"file://{folder}/bucket" if scheme == "file" else f"{scheme}://spotune/chaos-{uuid4().hex[:8]}"
            return Ground(material / f"{config}.yaml", Bucket(url), folder / "runs", hash_of(config, scheme))

        yield make


def hash_of(config: str, scheme: str) -> int:
    """A seed for each ground, from the seed of all."""
    return Random(f"{SEED} {config} {scheme}").getrandbits(32)
