"""The merged model computes what the adapter does, in the base's own type, and loads without PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from spotune.core.errors import SpotuneError
from spotune.sft.extras import TOLERANCE, base_options, check, merge, probe
from tests.tiny import make_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("merge") / "model")


def adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, rows: int = 0, **lora: Any) -> Path:
    """An adapter as training leaves one: its weights, what it trained whole, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**{**LORA, **lora}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    output = folder / "output"
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|assistant|>"  # as a chat template of another model may have it
    tokenizer.save_pretrained(output)
    for name in ("training_args.bin", "trainer_state.json"):
        (output / name).write_text("of the training")
    return output


def computed_by(folder: Path, dtype: torch.dtype, base: Path | None = None, rows: int = 0) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return probe((PeftModel.from_pretrained(model, folder) if base else model).eval())


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "float16": ("float16", {}),
    "a head trained whole": ("float32", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "that in bfloat16": ("bfloat16", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "dora": ("float32", {"use_dora": True, "use_rslora": True}),
    "tokens of another chat template": (
        "float32",
        {
            "rows": 384,
            "modules_to_save": ["lm_head"],
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [350, 351]},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_merged_it_computes_the_same(base: Path, tmp_path: Path, name: str) -> None:
    dtype, lora = CASES[name]
    kind = getattr(torch, dtype)
    output, merged = adapter(base, tmp_path, kind, **lora), tmp_path / "merged"
    facts = merge({"model_name_or_path": str(base), "dtype": dtype}, output, merged)
    assert facts["check"].startswith(f"{dtype}, logits ")
    wanted = computed_by(output, kind, base, lora.get("rows", 0))
    found = computed_by(merged, kind)
    assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    plain = computed_by(base, kind)
    if plain.shape == wanted.shape:
        assert (plain - wanted).norm() > 10 * TOLERANCE[dtype] * wanted.norm()  # the adapter matters
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"adapter_config.json", "training_args.bin", "trainer_state.json", "README.md"}
    settings = json.loads((merged / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert settings["dtype"] == dtype
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    weights = {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(merged, dtype="auto").parameters()}
    assert weights == {kind}


def test_what_is_not_merged_is_found_out(base: Path, tmp_path: Path) -> None:
    output = adapter(base, tmp_path)
    wanted, plain = computed_by(output, torch.float32, base), computed_by(base, torch.float32)
    effect = float((plain - wanted).norm() / wanted.norm())
    with pytest.raises(SpotuneError, match="away from the adapter's"):
        check(base, {}, wanted, effect, "float32")
    assert check(base, {}, plain, 0.0, "float32").startswith("float32, logits 0.0e+00 from")


def test_what_is_not_finite_is_found_out(base: Path, tmp_path: Path) -> None:
    output = adapter(base, tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(output / "adapter_model.safetensors")
    first = next(name for name in weights if "layers.1.mlp.up_proj.lora_B" in name)
    weights[first][0, 0] = float("inf")
    save_file(weights, output / "adapter_model.safetensors")
    with pytest.raises(SpotuneError, match=r"not finite, the first is .*layers\.1\.mlp\.up_proj\.weight"):
        merge({"model_name_or_path": str(base)}, output, tmp_path / "merged")


def test_the_base_is_loaded_as_training_did() -> None:
    assert base_options({}) == {
        "revision": "main", "trust_remote_code": False, "dtype": "float32", "device_map": None,
    }  # fmt: skip
    given = '{"dtype": "bfloat16", "device_map": "auto", "attn_implementation": "flash_attention_2", "subfolder": "x"}'
    found = base_options({"model_init_kwargs": given, "model_revision": "v1", "dtype": "float16"})
    assert (found["dtype"], found["revision"], found["subfolder"], found["device_map"]) == ("bfloat16", "v1", "x", None)
    assert "attn_implementation" not in found
    assert base_options({"load_in_4bit": True, "dtype": "float32"})["dtype"] == "bfloat16"
