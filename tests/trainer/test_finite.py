"""Weights that are not finite end a run; they reach no checkpoint and no result."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spotune.core.protocol import OUTPUT, STAGED
from spotune.sft.boundary import Finite, all_finite
from spotune.sft.preflight import NotFinite
from tests import tiny
from tests.ranks import Nursery, events, log_text, make_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_model(folder / "model")
    tiny.write_jsonl(folder / "train.jsonl", tiny.rows(40))
    return {
        "model_name_or_path": str(folder / "model"),
        "data": [{"source": str(folder / "train.jsonl")}],
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "max_length": 64,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


def staged_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in (folder / STAGED).glob("*.json"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found_and_the_largest_number_is_none(dtype: torch.dtype, value: float) -> None:
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=torch.float64).to(dtype)
    most = [ends, ends.reshape(3, 1), torch.zeros(0, dtype=dtype)]
    assert all_finite(most)
    bad = torch.ones(1000)
    bad[777] = value
    assert not all_finite([*most, bad.to(dtype)])


def test_integers_and_masks_do_not_decide() -> None:
    assert all_finite([torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0)])
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    model.bias.requires_grad = False
    model.bias.data.fill_(math.nan)  # frozen: it came with the base model
    assert Finite().fault(a_trainer(model, step=0)) == ""


def a_trainer(model: torch.nn.Module, step: int) -> Any:
    args, state = SimpleNamespace(world_size=1, device="cpu"), SimpleNamespace(global_step=step)
    return SimpleNamespace(model=model, args=args, state=state, optimizer=SimpleNamespace(state={}))


def test_the_step_is_named_as_far_as_it_is_known() -> None:
    model = torch.nn.Linear(2, 2)
    finite, trainer = Finite(), a_trainer(model, 0)

    def after(step: int) -> str:
        trainer.state.global_step = step
        return finite.fault(trainer)

    assert after(0) == ""
    finite.note(torch.tensor(math.nan))
    finite.end_step(1, was_skipped=True)  # as a gradient scaler does it
    finite.note(torch.tensor(math.inf))
    finite.end_step(2, was_skipped=False)
    assert after(3) == ""  # a loss that was not finite did no harm to the weights: from here on it is forgotten
    for step, norm in ((4, 1.0), (5, math.nan), (6, math.nan)):
        finite.note(torch.tensor(1.0))
        finite.note(norm)
        finite.end_step(step, was_skipped=False)
    assert after(8) == ""
    model.weight.data[0, 0] = math.inf
    assert after(9) == "the weights are not finite since step 9"
    assert after(11) == "the weights are not finite since step 11 or one before it (after step 8 they were)"
    finite.note(torch.tensor(math.nan))
    finite.end_step(10, was_skipped=False)
    assert after(11) == "the weights are not finite since step 10"
    assert Finite().fault(trainer) == "the weights are not finite in the checkpoint of step 11"


def test_an_optimizer_state_counts_after_a_gradient_that_was_not_finite() -> None:
    model = torch.nn.Linear(2, 2)
    trainer = a_trainer(model, 1)
    trainer.optimizer = SimpleNamespace(state={model.weight: {"exp_avg_sq": torch.tensor([math.inf]), "step": 1}})
    finite, trainer.state.global_step = Finite(), 0
    assert finite.fault(trainer) == ""
    trainer.state.global_step = 1
    finite.note(math.inf)  # the gradient's norm
    finite.end_step(1, was_skipped=False)
    assert finite.fault(trainer, with_optimizer=True) == "the optimizer state is not finite since step 1"


def test_a_rate_that_is_far_too_high_ends_with_the_last_finite_checkpoint(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "run", base | {"learning_rate": 1e30, "max_grad_norm": 0.0}, save_steps=1)
    outcome = ranks.run(folder)[0]
    assert (outcome["how"], outcome["step"]) == ("failed", 2)
    assert "the weights are not finite since step 2; the last finite checkpoint is of step 1 (" in outcome["message"]
    assert "learning_rate" in outcome["message"]
    assert staged_steps(folder) == [1]
    assert [line["loss"] in ("nan", "inf") for line in events(folder, "log")] == [False, True]
    assert "Traceback" not in log_text(folder)
    assert not (folder / OUTPUT).exists()


def test_a_run_that_saves_nothing_is_looked_at_before_its_result(
    ranks: Nursery, base: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"learning_rate": 1e30, "logging_steps": 100, "max_steps": 3, "save_strategy": "no"}
    folder = make_folder(tmp_path / "run", base | changes)
    outcome = ranks.run(folder)[0]
    assert outcome["how"] == "failed"
    assert "not finite since step 2; no checkpoint is kept" in outcome["message"]
    assert not (folder / OUTPUT).exists()
    assert staged_steps(folder) == []


def test_a_model_with_nan_in_it_does_not_begin(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base["model_name_or_path"]).save_pretrained(tmp_path / "model")
    folder = make_folder(tmp_path / "run", base | {"model_name_or_path": str(tmp_path / "model")})
    outcome = ranks.run(folder)[0]
    assert (outcome["how"], outcome["step"]) == ("failed", 0)
    assert "not finite in the model, before the first step" in outcome["message"]
    assert NotFinite.exit_code == 1


@pytest.mark.slow
def test_two_ranks_find_it_together(ranks: Nursery, base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", base | {"learning_rate": 1e30}, save_steps=1)
    outcomes = ranks.run(folder, world_size=2)
    assert {outcome["how"] for outcome in outcomes} == {"failed"}
    assert len({outcome["message"] for outcome in outcomes}) == 1
    assert staged_steps(folder) == [1, 1]
