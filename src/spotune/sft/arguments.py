"""Config -> TRL's own dataclasses, read exactly as ``trl sft --config`` reads them."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core.config_keys import is_on, settled
from spotune.core.errors import InputError
from spotune.core.machine_faults import is_machine_fault
from spotune.core.protocol import TRAINER, Job, wandb_mode
from spotune.sft.merge import doubts

OURS = ("data", "data_limit", "profiles", "num_processes", "keep_every", "merge_adapter")
# transformers' names of trackers whose module has another name
_TRACKER_MODULES = {"azure_ml": "azureml", "dagshub": "dagshub", "flyte": "flytekit", "dvclive": "dvclive"}
# What TRL's classes raise for values that they cannot use; `check` knows all of them that a config alone decides.
_REFUSALS = (ValueError, TypeError, ImportError, AttributeError, LookupError, OverflowError, OSError)


@dataclass(frozen=True)
class Arguments:
    """The four dataclasses of TRL's script."""

    script: Any
    training: Any
    model: Any
    datasets: Any


@dataclass(frozen=True)
class SaveRule:
    """When to save without being asked; all None and False: only at the end."""

    steps: int | None = None
    seconds: float | None = None
    as_config: bool = False


def parse(job: Job, folder: Path, rank: int) -> Arguments:
    """The config as TRL's dataclasses, with what is the guard's taken out of it. Raises InputError."""
    import yaml
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:  # argparse would print a usage of 500 lines and exit
            raise InputError(job.config_path, message)

    path = folder / f"config-{rank}.yaml"
    path.write_text(yaml.safe_dump(effective(job, folder), sort_keys=False))
    parser = Parser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog="spotune")
    try:
        found = parser.parse_args_and_config(["--config", str(path)])
    except InputError:
        raise
    except Exception as error:  # the config alone decides what these classes accept
        if is_machine_fault(error):
            raise
        raise InputError(job.config_path, str(error) or type(error).__name__) from error
    script, training, model, datasets = found
    if not all(isinstance(name, str) for name in training.report_to):
        raise InputError(job.config_path, "null does not name a tracker", key="report_to", remedy="report_to: none")
    if training.gradient_accumulation_steps < 1:
        raise InputError(job.config_path, "must be at least 1", key="gradient_accumulation_steps")
    training.report_to = usable_trackers(training.report_to, os.environ)
    _settle_cpu(training)
    _keep_global_batch(training, job)
    return Arguments(script, training, model, datasets)


def _settle_cpu(training: Any) -> None:
    """What transformers does not settle where there is no accelerator."""
    import torch

    if training.device.type != "cpu":
        return
    training.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns about it
    if training.world_size > 1:
        # Accelerate numbers the CPU of a distributed run, and torch.load knows no "cpu:0": no resume would work.
        training.distributed_state.device = torch.device("cpu")
        training.__dict__["_setup_devices"] = torch.device("cpu")  # where the cached property ``device`` is kept


def _keep_global_batch(training: Any, job: Job) -> None:
    """On another number of ranks than the run had so far, a step still takes the same rows. Raises InputError."""
    at_once = training.per_device_train_batch_size * training.world_size
    rows = job.global_batch
    if not rows or rows == at_once * training.gradient_accumulation_steps:
        return
    if rows % at_once:
        what = f"a step of this run takes {rows} rows, which {training.world_size} ranks cannot divide into batches"
        what += f" of {training.per_device_train_batch_size}"
        remedy = "a number of ranks that divides it, as before"
        raise InputError(job.config_path, what, key="per_device_train_batch_size", remedy=remedy)
    training.gradient_accumulation_steps = rows // at_once
    print(
        f"[spotune] {training.world_size} ranks instead of those so far: gradient_accumulation_steps"
        f" {training.gradient_accumulation_steps}, so that a step still takes {rows} rows",
        file=sys.stderr,
    )


def effective(job: Job, folder: Path) -> dict[str, Any]:
    """The config as TRL gets it."""
    config = {key: value for key, value in settled(job.config).items() if key not in OURS}
    config |= {"output_dir": str(folder / TRAINER), "save_total_limit": None, "resume_from_checkpoint": None}
    config |= {"push_to_hub": False, "enable_jit_checkpoint": False, "save_only_model": False}
    if "disable_tqdm" not in config and not sys.stdout.isatty():
        config["disable_tqdm"] = True
    config.setdefault("logging_nan_inf_filter", False)  # it shows the mean of other steps in place of a NaN
    if config.get("env") is None:
        config.pop("env", None)
    return config


def notices(config: Mapping[str, Any]) -> list[str]:
    """One line for each wish of the config that is not followed."""
    lines = []
    if is_on(config, "push_to_hub"):
        if config.get("hub_strategy") not in (None, "end") or is_on(config, "hub_always_push"):
            lines.append("hub_strategy: not followed; the result is pushed once, when it is certified")
        lines += doubts()
    if config.get("save_only_model"):
        lines.append("save_only_model: not followed, since a run could not be continued from such a checkpoint")
    if config.get("resume_from_checkpoint"):
        lines.append("resume_from_checkpoint: not followed; a run continues from its own newest checkpoint")
    return lines


def save_rule(job: Job) -> SaveRule:
    """The job's rule; where it has none the guard asks in time."""
    return SaveRule(job.save_steps, job.save_seconds, job.save_as_config)


def usable_trackers(wanted: list[str], environ: Mapping[str, str]) -> list[str]:
    """The trackers that can be used here: installed, and wandb only where it can reach its server.

    wandb's offline files are lost on a kill and double the steps of a resumed run, so offline runs are
    rebuilt from our own events instead.
    """
    usable = []
    for name in wanted:
        if importlib.util.find_spec(_TRACKER_MODULES.get(name, name)) is None and name not in (
            "tensorboard",
            "codecarbon",
        ):
            print(f"report_to: {name} is not installed, left out", file=sys.stderr)
        elif name == "wandb" and wandb_mode({"report_to": "wandb"}, environ) != "live":
            print(
                "report_to: wandb is written at the end (no WANDB_API_KEY, or WANDB_MODE is not online)",
                file=sys.stderr,
            )
        elif name == "tensorboard" and not (
            importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX")
        ):
            print("report_to: tensorboard is not installed, left out", file=sys.stderr)
        else:
            usable.append(name)
    return usable
