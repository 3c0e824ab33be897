"""The schema of a config is true to the TRL that is installed, and takes what TRL takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from spotune.core.config_keys import key_faults
from spotune.core.errors import InputError, refuse
from spotune.sft.arguments import build, path


def test_the_file_is_what_the_pinned_trl_gives() -> None:
    assert json.loads(path().read_text()) == json.loads(json.dumps(build())), "run: python -m spotune.sft.arguments"


ACCEPTED: list[dict[str, Any]] = [
    {"learning_rate": "1e-4", "num_train_epochs": 1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"},
    {"report_to": "wandb"},
    {"report_to": ["wandb", "tensorboard"]},
    {"fsdp": True, "fsdp_config": {"fsdp_version": 2}},
    {"fsdp": "full_shard auto_wrap", "optim": "adamw_8bit", "save_strategy": "best"},
    {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing_kwargs": '{"use_reentrant": false}'},
    {"lora_target_modules": "all-linear"},
    {"lora_target_modules": ["q_proj", "v_proj"], "max_length": None, "eval_steps": 0.25},
    {"datasets": [{"path": "json", "data_files": {"train": "a.jsonl"}, "fraction": 0.5}], "eval_strategy": "no"},
    {
        "env": {"A": "b"},
        "num_processes": 2,
        "merge_adapter": True,
        "data_limit": 5,
        "packing_strategy": "wrapped",
        "pad_to_multiple_of": "auto",
    },
]
REFUSED: dict[str, dict[str, Any]] = {
    "learning_rat: unknown key (did you mean learning_rate?)": {"learning_rat": 1},
    "learning_rate: 'fast' is not a number": {"learning_rate": "fast"},
    "learning_rate: -1 is too small (at least 0)": {"learning_rate": -1},
    "lora_r: 0 is too small (at least 1)": {"lora_r": 0},
    "max_steps: 2.5 is not a whole number": {"max_steps": 2.5},
    "packing: 'maybe' is not true or false": {"packing": "maybe"},
    "save_strategy: 'step' is not known (did you mean steps?)": {"save_strategy": "step"},
    'eval_strategy: False is not text (write it in quotes: "no")': {"eval_strategy": False},
    "fsdp_config: 3 is not": {"fsdp_config": [3]},
    "datasets[0].frac: unknown key": {"datasets": [{"path": "json", "frac": 1}]},
    "datasets[0]: needs a path": {"datasets": [{"name": "x"}]},
}


@pytest.mark.parametrize("config", ACCEPTED, ids=lambda config: next(iter(config)))
def test_accepts(config: dict[str, Any]) -> None:
    refuse("c.yaml", key_faults(config))


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message: str) -> None:
    with pytest.raises(InputError) as raised:
        refuse("c.yaml", key_faults(REFUSED[message]))
    assert str(raised.value).startswith(f"c.yaml: {message.split(' 3 is not')[0]}")


def test_a_check_reads_the_schema_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("c.yaml", key_faults(ACCEPTED[0]))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_, **__: pytest.fail("read again"))
    refuse("c.yaml", key_faults(ACCEPTED[0]))
