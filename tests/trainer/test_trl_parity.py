"""A config in the style of TRL's documentation gives the losses that ``trl sft --config`` gives, digit for digit."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.ranks import Nursery, make_folder, wait_for
from tests.ranks import log_text as printed

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "learning_rate": 2.0e-3,
        "use_cpu": True,
    },
    "full": {"learning_rate": "1e-3", "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.01},
    "packing": {"packing": True, "max_length": 64, "gradient_accumulation_steps": 2},
    # Evaluated at the end only: TRL's evaluation moves the randomness of the steps after it, ours does not.
    "evaluation": {"eval_strategy": "steps", "eval_steps": 6, "gradient_checkpointing": False},
    "assistant only": {"assistant_only_loss": True, "dataloader_num_workers": 1, "neftune_noise_alpha": 5},
    "completion only": {"format": "prompt_completion", "completion_only_loss": True, "logging_nan_inf_filter": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("parity") / "model", dropout=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_losses(ranks: Nursery, model: Path, tmp_path: Path, name: str) -> None:
    settings = dict(CONFIGS[name])
    format = settings.pop("format", "messages")
    for split, count in (("train", 40), ("test", 8)):
        tiny.write_jsonl(tmp_path / "rows" / f"{split}.jsonl", tiny.rows(count, format))
    config = {
        "model_name_or_path": str(model),
        "dataset_name": str(tmp_path / "rows"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        **({} if "use_cpu" in settings else {"bf16": False}),
        **settings,
    }
    ours = make_folder(tmp_path / "ours", config)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(theirs / "out")}))
    ranks.start(theirs, kind="trl")
    wait_for(theirs / "done", theirs)
    assert ranks.run(ours)[0]["how"] == "completed"
    expected = losses(printed(theirs))
    assert len(expected) == 6
    assert losses(printed(ours)) == expected


def losses(text: str) -> list[str]:
    """Trainer's printed lines, whole, but for what depends on the clock."""
    return [line for line in text.splitlines() if re.match(r"\{'loss'", line)]
