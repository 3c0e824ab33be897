"""What a checkpoint needs beyond Trainer's own files for an exact resume: ``spotune.json``, one per rank.

Trainer forgets, on resume: the tokens seen, the losses and metrics gathered since the last log line, and
an evaluation that was due when the machine was taken. Floats survive JSON bit for bit.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spotune.contracts.exchange import read_json, write_json

_COMMON = ("evaluation_owed", "epoch", "epoch_steps", "position")  # the same on all ranks, however many there are


@dataclass
class Extra:
    """The state of one rank beside Trainer's.

    Attributes:
        tokens: non-padding tokens trained since step 0, all ranks.
        evaluation_owed: an evaluation was due at this step and has not run.
        epoch, epoch_steps: where a stream is: its epoch, and the steps of that epoch so far.
        position: where the run is in its data, in rows (``Position``); empty in checkpoints of earlier versions.
        loss_sum: loss since the last log line; ``loss_total``: of all lines before; ``logged_step``: their last step.
        metrics: TRL's lists of values since the last log line.
    """

    tokens: int = 0
    evaluation_owed: bool = False
    epoch: int = 0
    epoch_steps: int = 0
    position: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_total: float = 0.0
    logged_step: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def write(self, checkpoint: Path, rank: int) -> None:
        write_json(checkpoint / file_name(rank), asdict(self))

    @classmethod
    def read(cls, checkpoint: Path, rank: int, world_size: int, tokens: int) -> "Extra | None":
        """What was written; with other ranks only what is common to all, None for a checkpoint made elsewhere."""
        found: dict[str, Any] | None = read_json(checkpoint / file_name(rank))
        lead = read_json(checkpoint / file_name(0))
        ranks = len(list(checkpoint.glob("spotune*.json")))
        if found is None or ranks != world_size:
            step = int((read_json(checkpoint / "trainer_state.json") or {}).get("global_step", 0))
            common = {name: lead[name] for name in _COMMON if name in lead} if lead else {}
            return cls(tokens=tokens, logged_step=step, **common) if tokens or lead else None
        return cls(**found)


def file_name(rank: int) -> str:
    return "spotune.json" if rank == 0 else f"spotune_{rank}.json"
