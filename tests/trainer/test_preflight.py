"""What a machine cannot do, and what is not there, is said before anything is loaded."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from spotune.core.errors import InputError
from spotune.sft.preflight import Hardware, check, check_hardware, outcome_of

ALL = frozenset({"bitsandbytes", "liger_kernel", "flash_attn", "kernels", "deepspeed"})
CPU = Hardware(packages=ALL)
T4 = Hardware("Tesla T4", (7, 5), ALL)
L4 = Hardware("NVIDIA L4", (8, 9), ALL)
BARE = Hardware("NVIDIA L4", (8, 9))
CASES: list[tuple[Hardware, dict[str, Any], str]] = [
    (CPU, {}, "bf16: needs a GPU"),
    (CPU, {"bf16": False}, ""),
    (CPU, {"use_cpu": True}, ""),
    (CPU, {"bf16": False, "fp16": True}, "fp16: needs a GPU"),
    (CPU, {"bf16": False, "load_in_4bit": True}, "load_in_4bit: quantized training needs a GPU"),
    (CPU, {"bf16": False, "use_liger_kernel": True}, "use_liger_kernel: Liger kernels need a GPU"),
    (CPU, {"bf16": False, "fsdp": "full_shard"}, "fsdp: FSDP needs GPUs"),
    (CPU, {"bf16": False, "tf32": True}, "tf32: TF32 needs"),
    (
        CPU,
        {"bf16": False, "attn_implementation": "flash_attention_2"},
        "attn_implementation: flash_attention_2 needs a GPU",
    ),
    (T4, {"bf16": True}, "bf16: needs an Ampere GPU or newer, this is a Tesla T4 (7.5)"),
    (T4, {"fp16": True}, ""),
    (
        T4,
        {"attn_implementation": "flash_attention_2", "fp16": True},
        "attn_implementation: flash_attention_2 needs an Ampere",
    ),
    (
        L4,
        {"load_in_4bit": True, "use_liger_kernel": True, "attn_implementation": "flash_attention_2", "tf32": True},
        "",
    ),
    (BARE, {"load_in_8bit": True}, "load_in_8bit: bitsandbytes is not installed"),
    (BARE, {"use_liger_kernel": "true"}, "use_liger_kernel: liger-kernel is not installed"),
    (BARE, {"attn_implementation": "flash_attention_2"}, "attn_implementation: flash-attn is not installed"),
    (BARE, {"deepspeed": "zero3.json"}, "deepspeed: deepspeed is not installed"),
]


@pytest.mark.parametrize(("machine", "config", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_hardware(machine: Hardware, config: dict[str, Any], expected: str) -> None:
    if not expected:
        check_hardware(config, "c.yaml", machine)
        return
    with pytest.raises(InputError) as raised:
        check_hardware(config, "c.yaml", machine)
    assert str(raised.value).startswith(f"c.yaml: {expected}")


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return {"model_name_or_path": str(model), "data": [{"source": str(tmp_path / "rows.jsonl")}]}


THERE: list[tuple[dict[str, Any], str]] = [
    (
        {"model_name_or_path": "/no/such/folder"},
        "model_name_or_path: no folder '/no/such/folder', and not a hub id",
    ),
    ({"model_name_or_path": "org/name/more"}, "model_name_or_path: no folder 'org/name/more'"),
    ({"data": [{"source": "/no/*.jsonl"}]}, "data[0].source: no file matches /no/*.jsonl"),
    ({"data": [{"source": "a", "wieght": 1}]}, "data[0].wieght: unknown key (did you mean weight?)"),
    ({"data": None, "datasets": [{"path": "json", "data_files": "/no.jsonl"}]}, "datasets[0].data_files: no such file"),
    ({"chat_template_path": "no.jinja"}, "chat_template_path: no such file: no.jinja"),
    ({"deepspeed": "no.json"}, "deepspeed: no such file: no.json"),
    ({"eval_strategy": "steps"}, "eval_strategy: there are no held-out rows"),
]


@pytest.mark.parametrize(("changes", "expected"), THERE, ids=lambda value: str(value)[:40])
def test_what_is_not_there(config: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as raised:
        check({**config, **changes}, "c.yaml", L4)
    assert str(raised.value).startswith(f"c.yaml: {expected}")
    assert "\n" not in str(raised.value)


def test_a_hub_that_is_away_is_the_machines(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ConnectionError, match="not in the hub's cache, and the hub cannot be reached") as raised:
        check({**config, "model_name_or_path": "org/name"}, "c.yaml", L4)
    assert outcome_of(raised.value, 0).how == "retry"


def test_a_hub_that_is_switched_off_is_bad_input(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not in the hub's cache, and the hub is offline"):
        check({**config, "model_name_or_path": "org/name"}, "c.yaml", L4)


def test_a_folder_that_is_no_model(config: dict[str, Any], tmp_path: Path) -> None:
    check(config, "c.yaml", L4)
    with pytest.raises(InputError, match=r"has no config\.json"):
        check({**config, "model_name_or_path": str(tmp_path)}, "c.yaml", L4)


def test_messages_need_a_chat_template(config: dict[str, Any]) -> None:
    config["data"][0]["format"] = "messages"
    with pytest.raises(InputError, match="has no chat template"):
        check(config, "c.yaml", L4)
    Path(config["model_name_or_path"], "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    check(config, "c.yaml", L4)
