"""Hours and dollars of one fine-tune.

FLOPs per token and parameter: 2 forward, 2 backward to activations, 2 backward to weights where they are trained, 2
for a forward that is made again (activation checkpointing). 6 in all is Kaplan et al. (arXiv 2001.08361); attention's
12 x layers x width x row length beside it is PaLM's (arXiv 2204.02311, appendix B), 4 of them forward.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimate.assumptions import BOOT, DATA, PREPARE, SAVE_EVERY, SETUP, TRANSFER, FineTune, Gpu
from spotune.core.config import load_config
from spotune.core.errors import InputError
from spotune.sft.row_counts import counts, held_out_count


@dataclass(frozen=True)
class Work:
    """What a fine-tune is, as its config's profile prod says it."""

    tokens: float
    row_length: int
    flops: float
    memory_gb: float  # per GPU: the sum in the config's header, an estimate


@dataclass(frozen=True)
class Timing:
    """Hours on one kind of machine."""

    useful_h: float
    start_h: float  # the first start
    lost_h: float  # paid for and lost by each preemption: start, restore, upload under way, half a save interval


def work_of(job: FineTune) -> Work:
    """Raises InputError for a config that is not as shipped."""
    config = load_config(job.config, "prod")
    said = re.search(r"(?m)^#   sum +([\d.]+) GB", job.config.read_text(encoding="utf-8"))
    if not said:
        raise InputError(job.config, "its header adds up no memory", remedy="#   sum  8.91 GB")
    # Packed, a device batch is one row.
    row_length = config["per_device_train_batch_size"] * config["max_length"]
    tokens = tokens_of(config, job.config) * config["num_train_epochs"]
    again = config["activation_checkpointing"] or config.get("fsdp_config", {}).get("activation_checkpointing", False)
    return Work(tokens, row_length, tokens * flops_per_token(job, row_length, again), float(said.group(1)))


def tokens_of(config: dict[str, Any], path: Path) -> float:
    """Of one epoch: the mixture's rows, as spotune takes them."""
    sizes: list[int] = []
    weights: list[float | None] = []
    tokens: list[float] = []
    for source in config["data"]:
        known = DATA.get(source["source"])
        if not known:
            raise InputError(path, f"nothing is assumed about {source['source']}", key="data")
        held_out = held_out_count(known.rows, source["split"]) if "split" in source else 0
        sizes.append(known.rows - held_out)
        weights.append(source.get("weight"))
        tokens.append(known.tokens_per_row)
    return math.fsum(rows * each for rows, each in zip(counts(sizes, weights), tokens, strict=True))


def flops_per_token(job: FineTune, row_length: int, again: bool) -> float:
    per_parameter = 4 + (0 if job.adapter else 2) + (2 if again else 0)
    attention = (16 if again else 12) * job.layers * job.attention_width * row_length
    return per_parameter * job.parameters + 6 * job.adapter + attention


def timing(job: FineTune, work: Work, gpu: Gpu) -> Timing:
    useful_s = work.flops / (job.gpus * gpu.bf16_tflops * 1e12 * job.utilization)
    start_s = BOOT.value + SETUP.value + PREPARE.value + job.model_gb / TRANSFER.value
    checkpoint_s = job.checkpoint_gb / TRANSFER.value
    lost_s = start_s + checkpoint_s + checkpoint_s + SAVE_EVERY.value / 2
    return Timing(useful_s / 3600, start_s / 3600, lost_s / 3600)


def on_demand_hours(times: Timing) -> float:
    return times.useful_h + times.start_h


def spot_hours(times: Timing, per_hour: float) -> float:
    """Paid hours: P = useful + start + lost x rate x P, preempted while it catches up too. Infinite: never done."""
    share = per_hour * times.lost_h
    return on_demand_hours(times) / (1 - share) if share < 1 else math.inf


def break_even(times: Timing, on_demand: float, spot: float) -> float:
    """Preemptions per hour at which spot costs what on-demand does; 0 where it is never cheaper."""
    return max(0.0, 1 - spot / on_demand) / times.lost_h
