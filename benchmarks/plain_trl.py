"""Plain ``trl sft`` with a clock: TRL's own script on a config, and a file with the time of each step's end.

    .venv-train/bin/python benchmarks/plain_trl.py CONFIG TIMES.jsonl

Each line: ``{"t": epoch seconds, "event": "step" | "save" | "begin", "step": n}``. Nothing else is changed.
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

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def _note(self, event: str, state: Any) -> None:
        self._file.write(json.dumps({"t": time.time(), "event": event, "step": state.global_step}) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("begin", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("step", state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("save", state)


def run(config: str, times: str) -> None:
    make = Trainer.__init__

    def make_with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(Clock(Path(times)))

    Trainer.__init__ = make_with_clock
    main(*make_parser().parse_args_and_config(["--config", config]))


if __name__ == "__main__":
    run(*sys.argv[1:])
