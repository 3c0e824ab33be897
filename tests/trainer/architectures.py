"""The models of config/runs, as far as their shape goes: built on the meta device, counted, never computed.

Shapes are those of the models' public config.json (named below); no hub is asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Published:
    """A model's shape, where it was published, and the size its name promises."""

    source: str
    family: str
    shape: dict[str, Any]
    promised: float  # parameters in its name


# fmt: off
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(
        "huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct config.json", "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192},
        135e6,
    ),
    "Qwen/Qwen3-0.6B": Published(
        "huggingface.co/Qwen/Qwen3-0.6B config.json", "qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
         "max_position_embeddings": 40960},
        0.6e9,
    ),
    "Qwen/Qwen3-8B": Published(
        "huggingface.co/Qwen/Qwen3-8B config.json", "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
         "max_position_embeddings": 40960},
        8.2e9,
    ),
}
# fmt: on


def build_meta(name: str, layers: int | None = None) -> Any:
    """The model that a config names, without memory; ``layers`` replaces their number."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if name in PUBLISHED:
        shape = PUBLISHED[name].shape | ({"num_hidden_layers": layers} if layers else {})
        config = CONFIG_MAPPING[PUBLISHED[name].family](**shape)
    else:
        config = AutoConfig.from_pretrained(ROOT / name)
    _register_counted_attention()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="counted")


def _register_counted_attention() -> None:
    """An attention that keeps what flash and memory-efficient kernels keep: q, k, v (repeated) and the output."""
    import torch
    from transformers import AttentionInterface

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            output = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, output)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            raise NotImplementedError("counted, never computed")

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        key, value = (each.repeat_interleave(module.num_key_value_groups, 1) for each in (key, value))
        return Kept.apply(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("counted", attention)


def kept_bytes_per_token_and_layer(name: str, lora: Any) -> float:
    """What one layer keeps for the backward pass, per token, in bf16: two layers less one."""
    tokens = 256
    one, two = (_kept_bytes(_with_adapter(build_meta(name, layers), lora), tokens) for layers in (1, 2))
    return (two - one) / tokens


def _with_adapter(model: Any, lora: Any) -> Any:
    from peft import get_peft_model

    # bf16 adapters, since autocast computes in bf16 whatever they are stored as
    return get_peft_model(model, lora, autocast_adapter_dtype=False) if lora else model


def _kept_bytes(model: Any, tokens: int) -> int:
    import torch

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    model.enable_input_require_grads()
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = body(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    assert output.last_hidden_state.shape[1] == tokens
    return sum(storage.nbytes() for storage in kept.values())
