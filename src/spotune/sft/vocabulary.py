"""Whether a model has an embedding for every token and every position of the data.

Where it has none a CPU raises an IndexError, and a GPU fails with a device-side assert that names neither row nor
token and looks like a fault of the machine.
"""

from dataclasses import dataclass
from typing import Any

from spotune.contracts.errors import InputError
from spotune.sft.rowcounts import RowCount

_REMEDY = "tokenizer and model do not belong together: take the tokenizer that the model was saved with"
_OTHER_PARTS = (
    "vision",
    "visual",
    "image",
    "audio",
    "speech",
)  # a multimodal model's encoders have their own positions
_POSITION_NAMES = ("wpe", "position_embeddings", "positions_embed", "embed_positions", "position_embedding")


@dataclass(frozen=True)
class Limits:
    """What a model has embeddings for: token ids below ``tokens``, positions below ``positions``; None: no limit."""

    tokens: int | None
    positions: int | None

    @classmethod
    def of(cls, model: Any) -> "Limits":
        return cls(embedding_rows(model), position_rows(model))


def check_rows(limits: Limits, tokenizer: Any, count: RowCount, config_path: str) -> None:
    """Raises InputError naming source and row of what the model has no embedding for."""
    if limits.tokens is not None and count.highest.value >= limits.tokens:
        source, row = count.origins.where(count.highest.index)
        raise InputError(
            source, _beyond(limits.tokens, tokenizer, count.highest.value), key=f"row {row}", remedy=_REMEDY
        )
    if count.lowest.value > 0:
        source, row = count.origins.where(count.lowest.index)
        what = f"{-count.lowest.value} is not a token, nor -100, which labels may be"
        raise InputError(source, what, key=f"row {row}", remedy="tokens are whole numbers from 0 on")
    if limits.positions is not None and count.longest.value > limits.positions:
        source, row = count.origins.where(count.longest.index)
        what = (
            f"row {row} of {source} has {count.longest.value} tokens, and the model only {limits.positions} positions"
        )
        raise InputError(config_path, what, key="max_length", remedy=f"max_length: {limits.positions}")


def check_batch(limits: Limits, tokenizer: Any, batch: Any, source: str, config_path: str) -> None:
    """Does the same for one batch of a stream, whose rows are not known before."""
    tokens = batch.get("input_ids")
    if tokens is None or not tokens.numel():
        return
    highest, longest = int(tokens.max()), tokens.shape[-1]
    if limits.tokens is not None and highest >= limits.tokens:
        raise InputError(source, _beyond(limits.tokens, tokenizer, highest), remedy=_REMEDY)
    if limits.positions is not None and longest > limits.positions and "position_ids" not in batch:
        what = f"a row of {source} has {longest} tokens, and the model only {limits.positions} positions"
        raise InputError(config_path, what, key="max_length", remedy=f"max_length: {limits.positions}")


def check_padding(limits: Limits, trainer: Any, config_path: str) -> None:
    """Raises InputError where batches are padded with a token that the model has no embedding for."""
    args, pad = trainer.args, getattr(trainer.data_collator, "pad_token_id", None)
    at_once = max(args.per_device_train_batch_size, _evaluated_at_once(trainer))
    if pad is None or limits.tokens is None or pad < limits.tokens or trainer.padding_free or at_once == 1:
        return
    what = f"batches are padded, and {_beyond(limits.tokens, trainer._tokenizer, pad)}"
    raise InputError(config_path, what, key="pad_token", remedy="a pad_token that the model has an embedding for")


def embedding_rows(model: Any) -> int | None:
    """Tokens that the model has an embedding for; None where that cannot be told."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(embeddings, "num_embeddings", None)  # also right where the weight is sharded
    if isinstance(rows, int) and rows > 0:
        return rows
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 2 and len(weight) else None


def position_rows(model: Any) -> int | None:
    """Positions that the model has an absolute embedding for; None where positions have no table, as with RoPE."""
    import torch

    found = []
    for name, module in model.named_modules():
        if _names_positions(name) and isinstance(module, torch.nn.Embedding):
            found.append(module.num_embeddings - int(getattr(module, "offset", 0)))
    for name, buffer in model.named_buffers():
        if _names_positions(name) and buffer.dim() == 2:
            found.append(int(buffer.shape[0]))
    return min(found, default=None)


def _names_positions(name: str) -> bool:
    return name.rpartition(".")[2] in _POSITION_NAMES and not any(part in name for part in _OTHER_PARTS)


def _evaluated_at_once(trainer: Any) -> int:
    return int(trainer.args.per_device_eval_batch_size) if trainer.eval_dataset is not None else 1


def _beyond(rows: int, tokenizer: Any, token: int) -> str:
    text = tokenizer.convert_ids_to_tokens(int(token)) if token < len(tokenizer) else None
    return f"token {token}{f' ({text!r})' if text else ''} is beyond the model's {rows} embeddings"
