"""Model, data and trainer as TRL's own script puts them together; a checkpoint resumed, and the result."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from spotune.core.config_keys import is_on
from spotune.core.errors import InputError, SpotuneError
from spotune.core.machine_faults import is_machine_fault
from spotune.core.protocol import Job
from spotune.sft.arguments import Arguments
from spotune.sft.boundary import Boundary, Extra
from spotune.sft.merge import write_card

# A restored checkpoint, made ready for Trainer: complete, and with paths of this machine in it.

STATE = "trainer_state.json"


def prepare(trainer: Any, restored: dict[str, Any]) -> str | None:
    """What to give to ``trainer.train``; None for a fresh start."""
    if not restored.get("checkpoint"):
        return None
    checkpoint = Path(restored["checkpoint"])
    args, boundary = trainer.args, trainer.boundary
    if trainer.is_fsdp_enabled:
        from spotune.sft.checkpoint_files import refuse_code  # here: torch's sharding is loaded where it is used

        refuse_code()
    if trainer.is_deepspeed_enabled:
        from spotune.sft import checkpoint_files

        checkpoint_files.refuse_deepspeed_code()
    _check_complete(checkpoint, trainer)
    if args.local_process_index == 0:
        _patch_best(checkpoint, restored.get("best_checkpoint"))
    boundary.resumed_from = checkpoint
    boundary.restored = Extra.read(checkpoint, args.process_index, args.world_size, int(restored.get("tokens") or 0))
    boundary.resumed_step = json.loads((checkpoint / STATE).read_bytes())["global_step"]
    boundary.resumed_step_rows = int(restored.get("global_batch") or 0)
    args.eval_on_start = False  # it was done before the first step
    if args.world_size > 1:
        import torch

        torch.distributed.barrier()
    return str(checkpoint)


def _check_complete(checkpoint: Path, trainer: Any) -> None:
    """Trainer takes a missing optimizer or RNG for a wish to start these afresh, without a word."""
    needed = [STATE]
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        needed += ["optimizer.pt", "scheduler.pt"]
    missing = [name for name in needed if not (checkpoint / name).exists()]
    if missing or not list(checkpoint.glob("rng_state*.pth")):
        raise SpotuneError(f"{checkpoint.name}: not a whole checkpoint, {', '.join(missing) or 'rng_state'} is missing")


def _patch_best(checkpoint: Path, best_checkpoint: str | None) -> None:
    """Puts this machine's path of the best checkpoint into the state; by rename, since files may be hard links."""
    state = json.loads((checkpoint / STATE).read_bytes())
    if state.get("best_global_step") == state.get("global_step"):
        best_checkpoint = str(checkpoint)
    if state.get("best_model_checkpoint") == best_checkpoint:
        return
    state["best_model_checkpoint"] = best_checkpoint
    part = checkpoint / f".{STATE}.part"
    part.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    os.replace(part, checkpoint / STATE)


# Model, data and trainer, put together as TRL's own script does it.

_OTHER_WEIGHTS = ("size mismatch", "ignore_mismatched_sizes")  # weights that are not those of the model's config


def build_trainer(args: Arguments, job: Job, boundary: Boundary) -> Any:
    """The trainer, with the model loaded and the data tokenized. Raises InputError for what TRL refuses."""
    from trl import get_peft_config, get_quantization_config

    from spotune.sft.data import load_data
    from spotune.sft.tokenizing import Preparation
    from spotune.sft.trainer import SpotTrainer

    training = args.training
    model_init_kwargs: dict[str, Any] = {
        "revision": args.model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": args.model.attn_implementation,
        "dtype": args.model.dtype,
    }
    training.model_init_kwargs = model_init_kwargs | (training.model_init_kwargs or {})
    data = load_data(args, job)
    origins = {"train": data.train_origins}
    if data.evaluation_origins is not None:
        origins["eval"] = data.evaluation_origins
    preparation = Preparation(origins, job.config_path, boundary.events)
    try:
        trainer = SpotTrainer(
            model=args.model.model_name_or_path,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            quantization_config=get_quantization_config(args.model),
            peft_config=get_peft_config(args.model),
            boundary=boundary,
            preparation=preparation,
        )
    except (ValueError, TypeError, RuntimeError, OSError, StopIteration) as error:
        raise _as_input_error(error, job.config_path) from error
    if training.fsdp and not trainer.is_fsdp_enabled:
        raise InputError(
            job.config_path, "was asked for, but accelerate would run DDP here", key="fsdp", remedy="FSDP needs GPUs"
        )
    return trainer


def _as_input_error(error: Exception, where: str) -> Exception:
    """An InputError for settings or a model that TRL and transformers refuse; any other fault as it is.

    Data is not looked at here: tokenizing.py has its errors.
    """
    text, key = str(error), "model_name_or_path"
    if is_machine_fault(error):
        return error
    if isinstance(error, StopIteration):
        return InputError(where, "there are no rows", key="data")
    if isinstance(error, OSError):  # transformers' own, without a number, says what a model's folder or id lacks
        is_theirs = error.errno is None or isinstance(error, FileNotFoundError)
        return InputError(where, text, key=key) if is_theirs else error
    if isinstance(error, TypeError):
        is_setting = "unexpected keyword argument" in text
        return InputError(where, text, key="model_init_kwargs") if is_setting else error
    is_of_weights = isinstance(error, RuntimeError) and any(word in text for word in _OTHER_WEIGHTS)
    return InputError(where, text) if isinstance(error, ValueError) or is_of_weights else error


# The result of a run: the model, its tokenizer and the training's history, in one folder.


def save_result(trainer: Any, output: Path, job: Job) -> None:
    """Writes the final model; all ranks take part, since a sharded model has to be gathered.

    Raises NotFinite, and writes nothing, where the model cannot be used.
    """
    if trainer.is_fsdp_enabled:  # save_model writes nothing, without a word, while the state is sharded
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.saver.require_finite(trainer)  # of a run that saves nothing this is the only look
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(str(output))
    if trainer.args.process_index == 0:
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        if is_on(job.config, "push_to_hub"):
            write_card(trainer, output, job.config, job.run_id)
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish()  # the process ends without unwinding, which would cut off what is still on its way
    if trainer.args.world_size > 1:
        import torch

        torch.distributed.barrier()
