"""What part of a cluster's GPUs a job takes."""

import math

from spotune.contracts.errors import InputError
from spotune.launch.task import parse_gpus

_FLAG = "--share"


def check_share(share: float | None, infra: str) -> None:
    """Raises InputError for a share that is none, or where GPUs come whole; ``infra`` empty: not known yet."""
    if share is None:
        return
    if not 0 < share <= 1 or math.isnan(share):
        raise InputError(_FLAG, f"{share:g} is no share of a GPU", remedy="--share 0.5")
    if share < 1 and infra.split("/", 1)[0] == "slurm":
        what = "Slurm hands out whole GPUs: SkyPilot runs its jobs there as steps, without Ray that would share one"
        raise InputError(_FLAG, what, remedy="leave it out, or another --infra")


def shared(gpus: str, share: float | None) -> str:
    """``L4:1`` and 0.5 -> ``L4:0.5``. Raises InputError where that is not to be had: Ray gives out a part of one GPU,
    or whole ones."""
    if share is None:
        return gpus
    if not gpus:
        raise InputError(_FLAG, "there is no GPU to share", remedy="leave it out, or a cluster with --gpus L4:1")
    name, count = parse_gpus(gpus, "--gpus")
    part = count * share
    if part > 1 and part != int(part):
        what = f"{share:g} of {gpus} is {part:g} GPUs: a part of one GPU is to be had, or whole ones"
        raise InputError(_FLAG, what, remedy=f"--gpus {name}:1 --share {share:g}, or --gpus {name}:{math.ceil(part)}")
    return f"{name}:{part:g}"
