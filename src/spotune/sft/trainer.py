"""Builds the trainer as TRL's own script does, resumes a checkpoint, and saves the result."""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import SaveStrategy, set_seed
from trl import SFTTrainer, get_peft_config, get_quantization_config

from spotune.core.config_keys import is_on
from spotune.core.errors import InputError, SpotuneError
from spotune.core.protocol import WorkerJob
from spotune.core.store.faults import is_machine_fault
from spotune.sft.arguments import Arguments
from spotune.sft.boundary import Boundary, EvaluationInterrupted, Extra
from spotune.sft.checkpoint_files import STATE, refuse_code, refuse_deepspeed_code
from spotune.sft.data import Epochs, load_data
from spotune.sft.extras import write_card
from spotune.sft.preflight import Stopped
from spotune.sft.tokenizing import Preparation, Renderer


def prepare(trainer: Any, restored: dict[str, Any]) -> str | None:
    """Makes a restored checkpoint ready and returns its folder; None for a fresh start. Raises SpotuneError."""
    if not restored.get("checkpoint"):
        return None
    checkpoint = Path(restored["checkpoint"])
    args, boundary = trainer.args, trainer.boundary
    if trainer.is_fsdp_enabled:
        refuse_code()
    if trainer.is_deepspeed_enabled:
        refuse_deepspeed_code()
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    needed = [STATE] if is_sharded else [STATE, "optimizer.pt", "scheduler.pt"]  # else Trainer silently starts afresh
    missing = [name for name in needed if not (checkpoint / name).exists()]
    if missing or not list(checkpoint.glob("rng_state*.pth")):
        raise SpotuneError(f"{checkpoint.name}: not a whole checkpoint, {', '.join(missing) or 'rng_state'} is missing")
    if args.local_process_index == 0:
        _patch_best(checkpoint, restored.get("best_checkpoint"))
    boundary.resumed_from = checkpoint
    boundary.restored = Extra.read(checkpoint, args.process_index, args.world_size, int(restored.get("tokens") or 0))
    boundary.resumed_step = json.loads((checkpoint / STATE).read_bytes())["global_step"]
    boundary.resumed_step_rows = int(restored.get("global_batch") or 0)
    args.eval_on_start = False  # it was done before the first step
    if args.world_size > 1:
        torch.distributed.barrier()
    return str(checkpoint)


def _patch_best(checkpoint: Path, best_checkpoint: str | None) -> None:
    """Writes this machine's path of the best checkpoint into the state; by rename, since files may be hard links."""
    state = json.loads((checkpoint / STATE).read_bytes())
    if state.get("best_global_step") == state.get("global_step"):
        best_checkpoint = str(checkpoint)
    if state.get("best_model_checkpoint") == best_checkpoint:
        return
    state["best_model_checkpoint"] = best_checkpoint
    part = checkpoint / f".{STATE}.part"
    part.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    os.replace(part, checkpoint / STATE)


def build_trainer(args: Arguments, job: WorkerJob, boundary: Boundary) -> Any:
    """Loads the model, tokenizes the data and returns the trainer. Raises InputError for what TRL refuses."""
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
    try:
        trainer = SpotTrainer(
            model=args.model.model_name_or_path,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            quantization_config=get_quantization_config(args.model),
            peft_config=get_peft_config(args.model),
            boundary=boundary,
            preparation=Preparation(origins, job.config_path, boundary.events),
        )
    except (ValueError, TypeError, RuntimeError, OSError, StopIteration) as error:
        raise _as_input_error(error, job.config_path) from error
    if training.fsdp and not trainer.is_fsdp_enabled:
        what = "accelerate would run DDP on this machine"
        raise InputError(job.config_path, what, key="fsdp", remedy="FSDP needs GPUs")
    return trainer


def _as_input_error(error: Exception, where: str) -> Exception:
    """Returns an InputError for settings or a model that TRL refuses, not for data; any other fault as it is."""
    text, key = str(error), "model_name_or_path"
    if is_machine_fault(error):
        return error
    if isinstance(error, StopIteration):
        return InputError(where, "there are no rows", key="data")
    if isinstance(error, OSError):  # transformers' own has no number and says what a model's folder or id lacks
        is_theirs = error.errno is None or isinstance(error, FileNotFoundError)
        return InputError(where, text, key=key) if is_theirs else error
    if isinstance(error, TypeError):
        return InputError(where, text, key="model_init_kwargs") if "unexpected keyword argument" in text else error
    # The weights are not those of the model's config.
    is_of_weights = isinstance(error, RuntimeError) and ("size mismatch" in text or "ignore_mismatched_sizes" in text)
    return InputError(where, text) if isinstance(error, ValueError) or is_of_weights else error


def save_result(trainer: Any, output: Path, job: WorkerJob) -> None:
    """Writes the model, its tokenizer and the training's history to ``output``.

    All ranks take part, to gather a sharded model. Raises NotFinite, and writes nothing, for an unusable model.
    """
    if trainer.is_fsdp_enabled:  # save_model silently writes nothing while the state is sharded
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.saver.require_finite(trainer)  # the only check of a run that saves nothing
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(str(output))
    if trainer.args.process_index == 0:
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        if is_on(job.config, "push_to_hub"):
            write_card(trainer, output, job.config, job.run_id)
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish()  # the process ends without unwinding and would cut off what wandb still sends
    if trainer.args.world_size > 1:
        torch.distributed.barrier()


class SpotTrainer(SFTTrainer):
    """An SFTTrainer that can be stopped, saved and resumed bit for bit at a step's end.

        step end ─▶ log ─▶ evaluate ─▶ save ─▶ leave?     (Trainer's order; ``boundary``, a callback, decides)

    An epoch's last step is decided at the epoch's end, since Trainer logs, evaluates and saves there once more: an
    earlier checkpoint could not record that. ``preparation`` counts and checks the rows while they are tokenized.
    """

    def __init__(self, *args: Any, boundary: Boundary, preparation: Preparation, **kwargs: Any) -> None:
        self._preparation = preparation
        self._evaluated: dict[str, float] = {}
        super().__init__(*args, callbacks=[boundary], **kwargs)
        preparation.check_model(self)
        self.boundary = boundary
        boundary.trainer = self
        self.saver = boundary.saver
        self.epochs = Epochs(self)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        renderer = Renderer(processing_class, self.chat_template, args)
        return self._preparation.prepare(super()._prepare_dataset, dataset, renderer, packing, dataset_name)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        with self._preparation.reading(self, "train"):
            found = super().get_batch_samples(self.boundary.timed(epoch_iterator), num_batches, device)
        self._preparation.check_streamed(self, found[0])
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.saver.finite.note(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.saver.finite.note(norm)
        return norm

    @property
    def is_streaming(self) -> bool:
        """True for data without a length: only training itself finds the end of an epoch."""
        return isinstance(self.train_dataset, torch.utils.data.IterableDataset)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        return self.epochs.plan(super().set_initial_training_values(args, dataloader), dataloader)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        return self.epochs.first(super()._init_training_state(*args))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns of missing keys, but not of a tied key whose weights are there under its other name."""
        missing, tied = set(load_result.missing_keys), getattr(self.model, "all_tied_weights_keys", None) or {}
        other = {**tied, **{source: target for target, source in tied.items()}}
        real = [key for key in load_result.missing_keys if other.get(key, key) in missing]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=real))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Seeds by the step if the checkpoint lacks this rank's state; Trainer would repeat the first step's seed."""
        rank, size = self.args.process_index, self.args.world_size
        if checkpoint and not Path(checkpoint, "rng_state.pth" if size == 1 else f"rng_state_{rank}.pth").exists():
            set_seed(self.args.seed + self.state.global_step)
        super()._load_rng_state(checkpoint)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: Trainer would train one step more
            self.control.should_training_stop = True
            return
        with self.epochs.running(kwargs):
            super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            self.boundary.evaluation_owed = True
            self._save_checkpoint(self.model, trial=None)
        if self.boundary.leaving:
            if self.saver.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, trial=None)
            raise Stopped(self.state.global_step)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        with self._known_metric(metrics):
            is_best = super()._determine_best_metric(metrics, trial)
        keeps_best = self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST
        if is_best and keeps_best:  # the best model must be there to load, whenever saves are due
            self.control.should_save = True
        return bool(is_best or self.control.should_save)  # Trainer puts this into should_save for save_strategy best

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates and keeps training's random state: the DataLoader of an evaluation draws a seed."""
        with self.boundary.phase("eval"), _unmoved_rng(), self._preparation.reading(self, "eval"):
            self._evaluated = metrics = super().evaluate(*args, **kwargs)
        self._preparation.check_evaluated(metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._known_metric(None):
            return super()._evaluate(*args, **kwargs)

    @contextmanager
    def _known_metric(self, metrics: dict[str, float] | None) -> Iterator[None]:
        """Turns Trainer's KeyError for an unknown metric into an InputError."""
        try:
            yield
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            known = ", ".join(name for name in metrics or self._evaluated if name.startswith("eval_"))
            key, what = "metric_for_best_model", f"{self.args.metric_for_best_model!r} is not a metric of this training"
            raise InputError(self.boundary.job.config_path, what, key=key, remedy=f"one of {known}") from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with self.boundary.phase("save"):
            self.saver.save(self, checkpoint, lambda: super(SpotTrainer, self)._save_checkpoint(model, trial))

    def _load_best_model(self) -> None:
        self.saver.settle()  # the best checkpoint may still be on its way to the disk
        super()._load_best_model()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with self._preparation.settings("optim"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with self._preparation.settings("lr_scheduler_type"):
            return super().create_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restores the states and keeps the config's settings, since a user may have changed them."""
        asked = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        for group, settings in zip(groups, asked, strict=True):
            group.update({name: value for name, value in settings.items() if name not in ("params", "lr")})
        scheduler = self.lr_scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            factors = [at(scheduler.last_epoch) for at in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def extra(self) -> Extra:
        return Extra(
            tokens=int(self._total_train_tokens),
            evaluation_owed=self.boundary.evaluation_owed,
            epoch=self.epochs.epoch,
            epoch_steps=self.epochs.steps,
            position=asdict(self.epochs.position()),
            loss_sum=self._tr_loss.item(),
            loss_total=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            metrics={name: list(values) for name, values in self._metrics["train"].items()},
        )

    def restore_extra(self, extra: Extra) -> None:
        """Restores what ``extra`` returned, when training begins."""
        self._total_train_tokens = extra.tokens
        self._tr_loss += extra.loss_sum
        self._total_loss_scalar = extra.loss_total
        self._globalstep_last_logged = extra.logged_step
        for name, values in extra.metrics.items():
            self._metrics["train"][name] = list(values)

    def evaluate_owed(self) -> None:
        """Runs the evaluation that was due when the run was stopped."""
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics=metrics, trial=None)
        self.control.should_save = False  # the restored checkpoint is of the same step
        if self.state.best_global_step == self.state.global_step and self.boundary.resumed_from:
            self.state.best_model_checkpoint = str(self.boundary.resumed_from)


@contextmanager
def _unmoved_rng() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.random.set_rng_state_all(cuda)
