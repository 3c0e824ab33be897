"""Model, data and trainer, put together as TRL's own script does it."""

from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
from spotune.contracts.machinefaults import is_machine_fault
from spotune.sft.arguments import Arguments
from spotune.sft.boundary import Boundary

_OTHER_WEIGHTS = ("size mismatch", "ignore_mismatched_sizes")  # weights that are not those of the model's config


def build_trainer(args: Arguments, job: Job, boundary: Boundary) -> Any:
    """The trainer, with the model loaded and the data tokenized. Raises InputError for what TRL refuses."""
    from trl import get_peft_config, get_quantization_config

    from spotune.sft.data import load_data
    from spotune.sft.preparation import Preparation
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
