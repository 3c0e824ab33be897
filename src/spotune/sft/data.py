"""What the run trains on and is evaluated on."""

from dataclasses import dataclass
from typing import Any

from spotune.contracts.exchange import Job
from spotune.sft.arguments import Arguments


@dataclass(frozen=True)
class Data:
    """Data sets of rows in one of TRL's formats; ``evaluation`` is None when the config evaluates nothing."""

    train: Any
    evaluation: Any


def load_data(args: Arguments, job: Job) -> Data:
    """Reads the data that the config names."""
    return _load_as_trl(args)


def _load_as_trl(args: Arguments) -> Data:
    from datasets import load_dataset
    from trl import get_dataset

    script = args.script
    if args.datasets.datasets:
        found = get_dataset(args.datasets)
    else:
        found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    wants_evaluation = args.training.eval_strategy != "no"
    return Data(found[script.dataset_train_split], found[script.dataset_test_split] if wants_evaluation else None)
