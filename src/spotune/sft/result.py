"""The result of a run: the model, its tokenizer and the training's history, in one folder."""

import sys
from pathlib import Path
from typing import Any

from spotune.contracts.configkeys import is_on
from spotune.contracts.exchange import Job
from spotune.sft.push import write_card


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
