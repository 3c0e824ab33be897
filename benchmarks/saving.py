"""What a save costs training: spotune beside Trainer's own saving, in turn, on the same model and data.

    .venv-train/bin/python benchmarks/saving.py [--parameters 200] [--rounds 2]

The cost of a save is counted whole: from its step's end to the next save, all steps together, minus what as many
undisturbed steps take (the median of the last steps before each save, when nothing is being written any more). So it
has the time that training stands still, and what writing, hashing and uploading take from the steps that follow.
spotune uploads to a ``file://`` bucket on the same disk and commits; Trainer writes to its output_dir.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SAVE_STEPS = 24
CALM = 4  # undisturbed steps before each save
SAVES = 4  # the first one is not counted: it is where memory is touched for the first time


@dataclass(frozen=True)
class Save:
    """One save's cost, seconds."""

    stall_s: float
    whole_s: float


def make_material(folder: Path, millions: int) -> dict[str, Any]:
    """A Llama of so many million parameters, a byte-level tokenizer, and rows; the config that trains it in full."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer, rows, write_jsonl

    width, layers = 896, 14
    vocabulary = max(512, int((millions * 1e6 - layers * (4 * width * width + 3 * width * 2432)) / (2 * width)))
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2432, num_hidden_layers=layers,
        num_attention_heads=14, num_key_value_heads=14, max_position_embeddings=256, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "data" / "train.jsonl", rows(400, "text"))
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M parameters", flush=True)
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_steps": SAVE_STEPS * (SAVES + 1) - 1,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1000,
        "report_to": "none",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
    }


def run_spotune(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a run through the script itself."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    environ = {**os.environ, "SPOTUNE_HOME": str(home), "SPOTUNE_RUN_ID": "saving", "HF_HUB_OFFLINE": "1"}
    environ.pop("SPOTUNE_BUCKET", None)
    _run([sys.executable, "-m", "spotune.sft", str(_write(folder / "ours.yaml", config))], environ, folder / "ours.log")
    parts = sorted(
        (home / "bucket/runs/saving/attempts/0001").glob("events-0-*"),
        key=lambda path: int(path.stem.rpartition("-")[2]),
    )
    events = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert sum(event["event"] == "commit" for event in events) >= SAVES, "not every save was committed"
    return events


def run_trl(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a run through TRL's own script."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    given = _write(folder / "theirs.yaml", config | {"output_dir": str(folder / "output")})
    times = folder / "times.jsonl"
    script = Path(__file__).with_name("plain_trl.py")
    _run(
        [sys.executable, str(script), str(given), str(times)],
        {**os.environ, "HF_HUB_OFFLINE": "1"},
        folder / "theirs.log",
    )
    return [json.loads(line) for line in times.read_text().splitlines()]


def costs(events: list[dict[str, Any]]) -> tuple[list[Save], float]:
    """The saves of a run but the first, and what an undisturbed step takes."""
    ends = {event["step"]: event["t"] for event in events if event["event"] == "step"}
    takes = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    saved = [event["step"] for event in events if event["event"] == "save" and event["step"] % SAVE_STEPS == 0][1:SAVES]
    calm = statistics.median(takes[step] for save in saved for step in range(save - CALM + 1, save + 1))
    found = []
    for step in saved:
        began = ends[step]
        stall_s = next(
            (
                event["stall_s"]
                for event in events
                if event["event"] == "save" and event["step"] == step and "stall_s" in event
            ),
            None,
        )
        if stall_s is None:
            stall_s = next(event["t"] for event in events if event["event"] == "save" and event["step"] == step) - began
        after = range(step + 1, step + SAVE_STEPS)
        found.append(Save(stall_s, sum(takes[number] for number in after) - calm * len(after)))
    return found, calm


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def _run(command: list[str], environ: dict[str, str], log: Path) -> None:
    with log.open("w") as out:
        code = subprocess.run(command, env=environ, stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"{' '.join(command)} ended with exit code {code}\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=200, metavar="MILLIONS")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    options = parser.parse_args()
    found: dict[str, list[Save]] = {"spotune": [], "Trainer": []}
    steps: dict[str, list[float]] = {"spotune": [], "Trainer": []}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as name:
        config = make_material(Path(name), options.parameters)
        for number in range(options.rounds):
            for label, run in (("Trainer", run_trl), ("spotune", run_spotune)):
                saves, calm = costs(run(Path(name), config))
                found[label] += saves
                steps[label].append(calm)
                print(
                    f"round {number + 1}, {label}: "
                    + ", ".join(f"{save.stall_s:.2f}/{save.whole_s:.2f}" for save in saves),
                    flush=True,
                )
    heads = ("", "saves", "stall, median", "worst", "whole cost, median", "worst", "undisturbed step")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for label, saves in found.items():
        stalls, wholes = [save.stall_s for save in saves], [save.whole_s for save in saves]
        print(
            f"| {label} | {len(saves)} | {statistics.median(stalls):.2f} s | {max(stalls):.2f} s "
            f"| {statistics.median(wholes):.2f} s | {max(wholes):.2f} s | {statistics.median(steps[label]):.2f} s |"
        )
    ratio = [
        statistics.median(getattr(save, what) for save in found["spotune"])
        / statistics.median(getattr(save, what) for save in found["Trainer"])
        for what in ("stall_s", "whole_s")
    ]
    print(f"\nspotune / Trainer: stall {ratio[0]:.3f}, whole cost {ratio[1]:.2f}")


if __name__ == "__main__":
    main()
