"""What ``check`` refuses as not going together, training refuses too: otherwise the rule would be ours alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.core.config import load_config
from spotune.core.errors import InputError
from tests.ranks import Nursery, make_folder
from tests.tiny import make_model, rows, write_jsonl

pytestmark = pytest.mark.slow  # tests/unit/core/test_config_faults.py has the rules themselves

EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "data": [{"source": "FOLDER/a.jsonl", "split": 2}]}
# the keys, and what `check` says first of them
RULES: dict[str, tuple[dict[str, Any], str]] = {
    "packing without a length": ({"packing": True, "max_length": None}, "max_length: "),
    "no padding, and a length": ({"padding_free": True}, "padding_free: "),
    "rows read ahead by nobody": ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor: "),
    "persistent workers that are none": ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: "),
    "a way to start no workers": ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_multiprocessing_"),
    "no such setting of the schedule": ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs.min_lr: "),
    "no end of the schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs: "),
    "no least rate": ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: "),
    "selective and reentrant": (
        {"activation_checkpointing_kwargs": {"selective": True, "use_reentrant": True}},
        "activation_checkpointing_kwargs: ",
    ),
    "an adapter on the head": ({"use_peft": True, "lora_target_modules": ["lm_head"]}, "lora_target_modules: "),
    "an adapter of no layers": ({"use_peft": True, "lora_target_modules": []}, "lora_target_modules: "),
    "arguments of no optimizer": ({"optim": "adamw_torch_4bit", "optim_args": "rank"}, "optim_args: "),
    "no such metric": ({**EVALUATES, "metric_for_best_model": "rouge"}, "metric_for_best_model: "),
    "an evaluation of nothing": ({"eval_on_start": True}, "eval_on_start: "),
    "accumulation twice": (
        {
            "gradient_accumulation_steps": 2,
            "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
        },
        "accelerator_config.",
    ),
    "text has no assistant": (
        {"data": [{"source": "FOLDER/text.jsonl", "format": "text"}], "assistant_only_loss": True},
        "assistant_only_loss: ",
    ),
    "a split that is not made": (
        {"data": None, "datasets": [{"path": "json", "data_files": "FOLDER/a.jsonl"}], "dataset_train_split": "x"},
        "dataset_train_split: ",
    ),
    "a share of one": (
        {"data": None, "datasets": [{"path": "json", "data_files": "FOLDER/a.jsonl"}], "test_split_size": 1.0},
        "test_split_size: ",
    ),
    "an endless stream": (
        {
            "data": None,
            "datasets": [{"path": "json", "data_files": "FOLDER/a.jsonl"}],
            "streaming": True,
            "max_steps": -1,
        },
        "max_steps: ",
    ),
    "a seed of more than 32 bits": ({"seed": 2**32}, "seed: "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rules")
    make_model(made / "model")
    write_jsonl(made / "a.jsonl", rows(12))
    write_jsonl(made / "text.jsonl", rows(12, "text"))
    return made


def config(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    base = {
        "model_name_or_path": "FOLDER/model",
        "data": [{"source": "FOLDER/a.jsonl"}],
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "report_to": "none",
    }
    found: dict[str, Any] = yaml.safe_load(yaml.safe_dump({**base, **keys}).replace("FOLDER", str(folder)))
    return found


@pytest.mark.parametrize("kind", RULES)
def test_training_refuses_what_check_refuses(kind: str, folder: Path, tmp_path: Path, ranks: Nursery) -> None:
    keys, line = RULES[kind]
    wrong = config(folder, keys)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(InputError) as raised:
        load_config(tmp_path / "c.yaml")
    assert raised.value.lines[0].startswith(f"{tmp_path}/c.yaml: {line}")
    (outcome,) = ranks.run(make_folder(tmp_path / "job", wrong))
    assert outcome["how"] in ("bad_input", "failed"), outcome


# Metrics that may choose the best model, and what else goes together though it looks as if it would not.
TAKEN: dict[str, dict[str, Any]] = {
    **{
        metric: {**EVALUATES, "metric_for_best_model": metric}
        for metric in ("loss", "eval_loss", "mean_token_accuracy", "entropy", "num_tokens", "runtime")
    },
    "words and wholes": {"packing": "n", "seed": 7.0, "logging_steps": "1e0", "max_steps": "1", "run_name": 5},
    "texts for open numbers": {"data_seed": "none", "max_length": "64"},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_training_takes_what_check_takes(kind: str, folder: Path, tmp_path: Path, ranks: Nursery) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config(folder, TAKEN[kind])))
    (outcome,) = ranks.run(make_folder(tmp_path / "job", load_config(tmp_path / "c.yaml")))
    assert outcome["how"] == "completed", outcome
