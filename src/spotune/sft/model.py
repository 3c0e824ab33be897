"""Model, data and trainer, put together as TRL's own script does it."""

from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.exchange import Job
from spotune.sft.arguments import Arguments
from spotune.sft.boundary import Boundary


def build_trainer(args: Arguments, job: Job, boundary: Boundary) -> Any:
    """The trainer, with the model loaded and the data tokenized. Raises InputError for what TRL refuses."""
    from trl import get_peft_config, get_quantization_config

    from spotune.sft.data import load_data
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
    try:
        trainer = SpotTrainer(
            model=args.model.model_name_or_path,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            quantization_config=get_quantization_config(args.model),
            peft_config=get_peft_config(args.model),
            boundary=boundary,
        )
    except (ValueError, RuntimeError) as error:
        raise _as_input_error(error, job.config_path) from error
    if training.fsdp and not trainer.is_fsdp_enabled:
        raise InputError(
            job.config_path, "was asked for, but accelerate would run DDP here", key="fsdp", remedy="FSDP needs GPUs"
        )
    return trainer


def _as_input_error(error: Exception, where: str) -> Exception:
    """TRL's and transformers' word for settings or data that do not go together; other faults as they are."""
    text = str(error)
    if "chat_template" in text and "not set" in text:
        remedy = "chat_template_path: a .jinja file or the id of a model that has one"
        return InputError(
            where, "the model has no chat template, which messages need", key="model_name_or_path", remedy=remedy
        )
    if isinstance(error, ValueError):
        return InputError(where, text)
    if "assistant_only_loss" in text:
        remedy = "a chat_template_path with {% generation %}, and an assistant's turn in every row"
        return InputError(where, "a row has no tokens of the assistant", key="assistant_only_loss", remedy=remedy)
    return error
