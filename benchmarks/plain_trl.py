"""Plain ``trl sft`` with a clock: TRL's own script on a config, and a file with the time of each event.

    .venv-train/bin/python benchmarks/plain_trl.py CONFIG TIMES.jsonl [SLOW_S]

Each line: ``{"t": epoch seconds, "event": "begin" | "batch" | "between" | "step" | "saving" | "save", "step": n}``.
"batch" is the start of a micro-batch, "between" the gap before the same step's next one, "saving" the middle of a save:
the weights are written, the optimizer is not. With SLOW_S these three and "begin" take that many seconds longer, so
that a signal can hit them. Nothing else is changed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from trl.scripts.sft import main, make_parser


class Clock(TrainerCallback):
    """Writes down when things happen."""

    def __init__(self, path: Path, slow_s: float) -> None:
        self._file = path.open("w", buffering=1)
        self._slow_s = slow_s

    def note(self, event: str, state: Any) -> None:
        self._file.write(json.dumps({"t": time.time(), "event": event, "step": state.global_step}) + "\n")

    def note_slowly(self, event: str, state: Any) -> None:
        self.note(event, state)
        time.sleep(self._slow_s)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note_slowly("begin", state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note_slowly("between", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("step", state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("save", state)


def run(config: str, times: str, slow_s: str = "0") -> None:
    clock = Clock(Path(times), float(slow_s))
    make = Trainer.__init__

    def make_with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(clock)

    def noted(event: str, method: Any) -> Any:
        def note_first(self: Any, *args: Any, **kwargs: Any) -> Any:
            clock.note_slowly(event, self.state)
            return method(self, *args, **kwargs)

        return note_first

    Trainer.__init__ = make_with_clock
    Trainer.training_step = noted("batch", Trainer.training_step)
    Trainer._save_optimizer_and_scheduler = noted("saving", Trainer._save_optimizer_and_scheduler)
    main(*make_parser().parse_args_and_config(["--config", config]))


if __name__ == "__main__":
    run(*sys.argv[1:])
