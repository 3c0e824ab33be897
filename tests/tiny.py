"""A model, a tokenizer and data small enough for tests: made in a second, without a network."""

import json
from pathlib import Path
from random import Random
from typing import Any

# {% generation %} marks what the assistant says, for assistant_only_loss.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "old",
    "new",
    "quick",
    "slow",
    "cat",
    "dog",
    "bird",
    "fish",
    "tree",
    "house",
    "runs",
    "sleeps",
    "eats",
    "sees",
    "finds",
]


def make_model(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, dropout: float = 0.0, layers: int = 2
) -> Path:
    """Writes a Llama of about 100k parameters with its byte-level BPE tokenizer; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, attention_dropout=dropout,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentence(Random(seed)) for seed in range(200)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = chat_template
    return fast


def sentence(rng: Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, most)))


def rows(count: int, format: str = "messages", seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of ``messages``, ``prompt_completion`` or ``text``."""
    rng = Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        question, answer = sentence(rng), sentence(rng)
        if format == "messages":
            made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        elif format == "prompt_completion":
            made.append({"prompt": question, "completion": f" {answer}"})
        else:
            made.append({"text": f"{question} {answer}"})
    return made


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path
