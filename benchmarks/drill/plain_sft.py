"""``trl sft``'s own script, as people make it resumable: ``resume_from_checkpoint=True`` where there is a checkpoint.

    python plain_sft.py CONFIG EVENTS

Training is TRL's ``main`` and nothing else; a callback that only listens writes the events by which a game day finds
its moments.
"""

import os
import sys
from pathlib import Path
from typing import Any

from spotune.core.protocol import EventLog


def main(config: Path, events: EventLog) -> None:
    events.phase("load")
    import trl
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl.scripts import sft

    class Listener(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.write("plan", max_steps=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.write("step", step=state.global_step, tokens=0, data_wait_s=0)
            self._announce(control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._announce(control)

        def _announce(self, control: Any) -> None:
            if control.should_save:
                events.phase("save")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.write("save", step=state.global_step, stall_s=0)
            events.phase("train")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.phase("teardown")

    class Watched(trl.SFTTrainer):  # TRL's main takes no callbacks
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, callbacks=[Listener()])

    found = sft.make_parser(prog="plain").parse_args_and_config(["--config", str(config)])
    script, training, model, datasets = found
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False
    if os.path.isdir(training.output_dir) and get_last_checkpoint(training.output_dir):
        training.resume_from_checkpoint = True
    trl.SFTTrainer = Watched
    sft.main(script, training, model, datasets)


if __name__ == "__main__":
    main(Path(sys.argv[1]), EventLog(Path(sys.argv[2])))
