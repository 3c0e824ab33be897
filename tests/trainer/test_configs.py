"""The shipped configs hold: keys, TRL's dataclasses, models, adapters, and the memory that comments add up."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from spotune.core.config import load_config
from tests.trainer.architectures import PUBLISHED, ROOT, build_meta, kept_bytes_per_token_and_layer

RUNS = ROOT / "config" / "runs"
FILES = sorted(RUNS.glob("*.yaml"))
OURS = ("data", "data_limit")
CASES = [pytest.param(path, profile, id=f"{path.stem}-{profile}") for path in FILES for profile in ("dev", "prod")]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
GB = 1e9
FSDP_RANKS = 8
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; an 8-bit scale per 64; an fp32 scale per 256 of those
MEMORY_LINE = re.compile(r"^#   (\w+) +([\d.]+) GB(?:  (.*))?$", re.MULTILINE)


def parse_by_trl(config: dict[str, Any], folder: Path) -> tuple[Any, Any, Any]:
    """Script, training and model arguments, as ``trl sft --config`` would read them on a machine without GPU."""
    import yaml
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    plain = {key: value for key, value in config.items() if key not in OURS} | {"use_cpu": True}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(plain | {"output_dir": str(folder)}))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config(["--config", str(path)])
    return script, training, model


def lora_of(config: dict[str, Any], folder: Path) -> Any:
    from trl import get_peft_config

    return get_peft_config(parse_by_trl(config, folder)[2])


@pytest.fixture(autouse=True)
def demo_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the repo's root; transformers leaves a variable behind for FSDP."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


def test_there_is_a_config_for_each_scale() -> None:
    assert [path.stem for path in FILES] == [
        "demo", "qwen3-0.6b-lora", "qwen3-8b-full-fsdp2", "qwen3-8b-qlora", "smollm2-135m-lora",
    ]  # fmt: skip


@each_file
def test_first_line_gives_editors_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).resolve() == ROOT / "src/spotune/core/schema.json"


@pytest.mark.parametrize(("path", "profile"), CASES)
def test_trl_takes_every_key(path: Path, profile: str, tmp_path: Path) -> None:
    """TrlParser raises for a key that none of its dataclasses has, SFTConfig for values that do not go together."""
    config = load_config(path, profile)
    assert config["data"]
    _, training, model = parse_by_trl(config, tmp_path)
    assert model.model_name_or_path == config["model_name_or_path"]
    for key in set(config) - set(OURS) - {"env", "report_to", "fsdp_config", "use_cpu", "lora_target_modules"}:
        holder = training if hasattr(training, key) else model
        assert getattr(holder, key) == config[key], key


@each_file
def test_dev_is_short_and_prod_is_not(path: Path) -> None:
    dev, prod = load_config(path, "dev"), load_config(path, "prod")
    assert dev["max_steps"] <= 30
    assert dev["data_limit"] <= 2000
    assert prod.get("max_steps", 0) > 100 or prod["num_train_epochs"] >= 1
    assert "data_limit" not in prod


def test_fsdp_is_version_2_with_its_own_checkpointing(tmp_path: Path) -> None:
    config = load_config(RUNS / "qwen3-8b-full-fsdp2.yaml", "prod")
    _, training, _ = parse_by_trl(config, tmp_path)
    plugin = training.fsdp_plugin_args
    assert plugin["fsdp_version"] == 2
    assert plugin["activation_checkpointing"]
    assert not training.activation_checkpointing
    assert plugin["reshard_after_forward"]
    layers = {type(module).__name__ for module in build_meta(config["model_name_or_path"], 1).modules()}
    assert set(plugin["transformer_cls_names_to_wrap"].split(",")) <= layers


def test_qlora_is_what_bitsandbytes_gets(tmp_path: Path) -> None:
    from trl import get_quantization_config

    _, _, model = parse_by_trl(load_config(RUNS / "qwen3-8b-qlora.yaml", "prod"), tmp_path)
    wanted = get_quantization_config(model).to_dict()
    assert wanted["load_in_4bit"]
    assert wanted["bnb_4bit_quant_type"] == "nf4"
    assert wanted["bnb_4bit_use_double_quant"]
    assert wanted["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_is_of_the_size_in_its_name(name: str) -> None:
    model = build_meta(name)
    assert model.num_parameters() == pytest.approx(PUBLISHED[name].promised, rel=0.01)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("path", [path for path in FILES if "full" not in path.stem], ids=lambda path: path.stem)
def test_adapter_sits_on_every_linear_layer(path: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    config = load_config(path, "prod")
    model = build_meta(config["model_name_or_path"])
    layers = model.config.num_hidden_layers
    adapted = get_peft_model(model, lora_of(config, tmp_path))
    places = {name.split(".")[-1] for name in adapted.targeted_module_names}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapted.targeted_module_names) == 7 * layers
    trainable, total = adapted.get_nb_trainable_parameters()
    said = re.search(r"([\d.]+) % of the model", path.read_text(encoding="utf-8"))
    assert said
    assert float(said[1]) == pytest.approx(100 * trainable / (total - trainable), abs=0.05)


@each_file
def test_memory_in_the_comments_adds_up(path: Path, tmp_path: Path) -> None:
    """Each line's figure is its own arithmetic, and both are what the model on the meta device gives."""
    text = path.read_text(encoding="utf-8")
    assert "arithmetic (tests/trainer/test_configs.py does it again), not measured" in text
    lines = {label: (float(figure), sum_text) for label, figure, sum_text in MEMORY_LINE.findall(text)}
    expected = memory_parts(load_config(path, "prod"), tmp_path)
    assert set(lines) - {"sum"} == set(expected)
    for label, wanted in expected.items():
        figure, arithmetic = lines[label]
        assert figure * GB == pytest.approx(wanted, abs=0.0051 * GB), f"{label}: {wanted / GB:.3f} GB"
        assert evaluate(arithmetic) == pytest.approx(wanted, rel=0.01, abs=0.002 * GB), label
    if "sum" in lines:
        assert lines["sum"][0] * GB == pytest.approx(sum(expected.values()), abs=0.0051 * GB), sum(expected.values())


def memory_parts(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Bytes by the labels that the comments use."""
    from peft import get_peft_model

    name = config["model_name_or_path"]
    model = build_meta(name)
    total = model.num_parameters()
    lora = lora_of(config, folder)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    linear = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    quantized = linear if config.get("load_in_4bit") else 0
    parts: dict[str, float] = {"nf4": NF4_BYTES * quantized} if quantized else {}
    if config.get("fsdp"):
        outside = total - layer * model.config.num_hidden_layers
        parts |= {"shards": 16 * total / FSDP_RANKS, "gathered": 2 * (outside + layer)}
    else:
        trained, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
        width = {"bfloat16": 2, "float32": 4}[config["dtype"]]
        parts |= {"weights": width * (total - quantized), "adapter": (8 if quantized else 16) * trained}
    if config.get("use_cpu"):
        return parts
    return parts | {"activations": activations(config, model.config, kept_bytes_per_token_and_layer(name, lora))}


def activations(config: dict[str, Any], shape: Any, kept_bytes: float) -> float:
    """Bytes kept for the backward pass; with checkpointing the layers' inputs, and all of the one being recomputed."""
    row = config["per_device_train_batch_size"] * config["max_length"]
    recomputes = config["activation_checkpointing"] or config.get("fsdp_config", {}).get("activation_checkpointing")
    if not recomputes:
        return float(shape.num_hidden_layers * row * kept_bytes)
    return float(row * (shape.num_hidden_layers * 2 * shape.hidden_size + kept_bytes))


def evaluate(arithmetic: str) -> float:
    """``28 layers x 4096 tokens x 65.9 kB, and …`` -> bytes; a note stands behind two spaces."""
    units = {"M": 1e6, "kB": 1e3}
    terms = re.split(r", and ", re.split(r" {2,}", arithmetic.strip())[0])
    total = 0.0
    for term in terms:
        product, _, divisor = term.partition(" / ")
        factors = [factor.split() for factor in product.split(" x ")]
        value = math.prod(float(number) * units.get("".join(unit[:1]), 1.0) for number, *unit in factors)
        total += value / float(divisor or 1)
    return total
