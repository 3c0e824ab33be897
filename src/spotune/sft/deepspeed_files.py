"""Reads DeepSpeed's checkpoints without running code that somebody else may have put into them.

DeepSpeed calls ``torch.load`` with ``weights_only=False`` on files from the bucket. Here torch reads them as weights,
and as the few classes of DeepSpeed's own that its checkpoints hold.
"""

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

from spotune.contracts.errors import SpotuneError
from spotune.sft.usable import reason_of

# Plain data: to make one of them runs no code of the file's choice.
_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_load_of_torch = torch.load


def refuse_code() -> None:
    """Makes every ``torch.load`` of this process, DeepSpeed's among them, read files as weights."""
    torch.load = _load


def _load(f: Any, *args: Any, weights_only: bool | None = None, **options: Any) -> Any:
    """Stands in for ``torch.load``. Raises SpotuneError, naming the file, for one that names another class."""
    try:
        with safe_globals(), torch.serialization.safe_globals(_known_classes()):
            return _load_of_torch(f, *args, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        path = Path(f if isinstance(f, (str, Path)) else str(getattr(f, "name", "checkpoint")))
        what = f"cannot be read as weights: {reason_of(error)}"
        raise SpotuneError(f"{path.parent.name}/{path.name}: {what}") from error


def _known_classes() -> list[Any]:
    """The classes that this version of DeepSpeed has."""
    found = []
    for module, name in _CLASSES:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return found
