"""From the command to the first step's end: spotune, with and without a checkpoint to restore, beside ``trl sft``.

    .venv-train/bin/python benchmarks/first_step.py [--rounds 5] [--megabytes 500]

``trl sft`` is started as its users start it (the command ``trl``), and by its script alone. spotune is started as a
task starts it; "restored" is a second attempt that first fetches a checkpoint of the given size. Wall seconds.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent


def make_material(folder: Path, megabytes: int) -> dict[str, Any]:
    """A model whose full checkpoint (weights and two Adam moments in fp32) has about so many megabytes."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer, rows, write_jsonl

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    width = 512
    vocabulary = max(512, int(megabytes * 1e6 / 12 / (2 * width)))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "data" / "train.jsonl", rows(200, "text"))
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": 100000,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "max_length": 32,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
    }


def until_first_step(command: list[str], environ: dict[str, str], log: Path, leave: bool = False) -> float:
    """Starts a command and waits for Trainer's first line of losses; returns how long that took, and ends it.

    With ``leave`` it gets a notice, so that it saves and commits first.
    """
    with log.open("w") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=out, start_new_session=True)
        while "'loss':" not in log.read_text():
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with {process.returncode}\n{log.read_text()[-2000:]}")
            time.sleep(0.01)
        took = time.monotonic() - began
        if leave:
            process.send_signal(signal.SIGTERM)
        else:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        config = make_material(folder, options.megabytes)
        (folder / "ours.yaml").write_text(yaml.safe_dump(config))
        (folder / "theirs.yaml").write_text(yaml.safe_dump(config | {"output_dir": str(folder / "output")}))
        home, log = folder / "home", folder / "log"
        theirs = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        ours = {**theirs, "SPOTUNE_HOME": str(home), "SPOTUNE_RUN_ID": "start"}
        script = [sys.executable, "-m", "trl.scripts.sft", "--config", str(folder / "theirs.yaml")]
        command = [str(Path(sys.executable).with_name("trl")), "sft", "--config", str(folder / "theirs.yaml")]
        spotune = [sys.executable, "-m", "spotune.sft", str(folder / "ours.yaml")]
        for _ in range(options.rounds + 1):
            rows.setdefault("`trl sft`", []).append(until_first_step(command, theirs, log))
            rows.setdefault("TRL's script alone", []).append(until_first_step(script, theirs, log))
            shutil.rmtree(home, ignore_errors=True)
            rows.setdefault("spotune", []).append(until_first_step(spotune, ours, log, leave=True))
            (commit,) = (home / "bucket/runs/start/commits").glob("*.json")
            size = sum(file["size"] for file in json.loads(commit.read_text())["files"].values())
            label = f"spotune, {size / 1e6:.0f} MB restored"
            rows.setdefault(label, []).append(until_first_step(spotune, ours, log))
    print("| | seconds to the first step, median | least | most |\n|---|---|---|---|")
    for label, seconds in rows.items():
        counted = seconds[1:]  # the first round fills caches
        print(f"| {label} | {statistics.median(counted):.1f} | {min(counted):.1f} | {max(counted):.1f} |")


if __name__ == "__main__":
    main()
