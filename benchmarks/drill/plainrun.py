"""A run of plain ``trl sft`` on a disk that is kept: what a user has without spotune."""

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from drill.contender import Account, Hold, Launch
from spotune.core.config import load_config
from spotune.core.errors import InputError, StoreError
from spotune.core.protocol import WorkerJob
from spotune.guard.finish import weights_sha256
from spotune.sft.arguments import OURS

SCRIPT = Path(__file__).with_name("plain_sft.py")


def plain_config(path: str, profile: str, sets: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The config as ``trl sft --config`` takes it: resolved, its ``data:`` written out as rows of one folder."""
    config = load_config(path, profile, sets)
    if config.get("dataset_streaming"):
        raise InputError(path, "plain TRL replays a streamed epoch from its start", key="dataset_streaming")
    if config.get("data"):
        config |= {"dataset_name": str(_written_out(config, path, folder))}
    return {name: value for name, value in config.items() if name not in OURS and value is not None}


def _written_out(config: dict[str, Any], path: str, folder: Path) -> Path:
    from spotune.sft import arguments
    from spotune.sft.data import load_data

    folder.mkdir(parents=True, exist_ok=True)
    job = WorkerJob(run_id="plain", attempt=1, config=config, config_path=path, cache=str(folder / "cache"))
    data = load_data(arguments.parse(job, folder, 0), job)
    for split, rows in (("train", data.train), ("test", data.evaluation)):
        if rows is not None:
            rows.to_json(folder / "rows" / f"{split}.jsonl")
    return folder / "rows"


class PlainRun:
    """One run; everything that it has is in ``folder``, which no kill takes away."""

    noticed: tuple[int, ...] = (-15,)

    def __init__(self, folder: Path, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._folder, self._output = folder, folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "config.yaml"
        kept = {"save_total_limit": 3, "disable_tqdm": True, "report_to": "none"}
        self._config.write_text(yaml.safe_dump({**kept, **config, "output_dir": str(self._output)}))
        self._environ = {**environ, "HF_HOME": str(folder / "hf")}
        self._launches = 0

    def launch(self, disk: Path, hold: Hold | None) -> Launch:
        self._launches += 1
        events = self._folder / f"events-{self._launches}.jsonl"
        return Launch([sys.executable, "-P", str(SCRIPT), str(self._config), str(events)], self._environ)

    def event_log(self, disk: Path, since: float) -> Path | None:
        log = self._folder / f"events-{self._launches}.jsonl"
        return log if log.exists() else None

    def repair(self) -> bool:
        """Removes the newest checkpoint, which is what Trainer takes up and cannot read."""
        numbered = [(int(found[1]), path) for path in self._output.glob("checkpoint-*")
                    if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))]  # fmt: skip
        if not numbered:
            return False
        shutil.rmtree(max(numbered)[1])
        return True

    def account(self) -> Account:
        files = sorted(self._output.glob("*.safetensors"))
        try:
            return Account(weights=weights_sha256(files) if files else None)
        except StoreError:  # half-written
            return Account(weights=None)
