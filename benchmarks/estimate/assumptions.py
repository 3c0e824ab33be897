"""Everything that is assumed, in one place, each with where it comes from. Printed with the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

RUNS = Path(__file__).parents[2] / "config" / "runs"


class Assumed(NamedTuple):
    value: float
    unit: str
    what: str
    source: str


BOOT = Assumed(180, "s", "a new machine, from being paid for to its set-up", "none, a guess")
SETUP = Assumed(300, "s", "its set-up: Python environment and code", "none, a guess; a baked image has less")
PREPARE = Assumed(120, "s", "imports, tokenizing again, first step", "none, a guess")
TRANSFER = Assumed(0.5, "GB/s", "between a machine and bucket or hub, model and checkpoints", "none, a guess")
SAVE_EVERY = Assumed(300, "s", "from one save to the next", "spotune's default")
NOTICE = Assumed(0, "s", "notice of a preemption: the newest finished upload is all there is", "the worst case")
HEADROOM = Assumed(2, "×", "a GPU must have so many times the memory that the config's header adds up",
                   "picks the GPUs that the headers name")  # fmt: skip
BYTES_PER_TOKEN = Assumed(5, "bytes", "of a data set's card (prompt twice, ids) per token", "none, a guess")
GENERAL = (BOOT, SETUP, PREPARE, TRANSFER, SAVE_EVERY, NOTICE, HEADROOM, BYTES_PER_TOKEN)


class DataSet(NamedTuple):
    rows: int
    tokens_per_row: float
    source: str


DATA = {
    "hf://HuggingFaceH4/ultrachat_200k": DataSet(
        207_865,
        1_397_058_554 / 207_865 / BYTES_PER_TOKEN.value,
        "its card (train_sft): 207,865 rows, 1,397,058,554 bytes",
    ),
    "hf://trl-lib/Capybara": DataSet(
        15_806, 71_908_734 / 15_806 / BYTES_PER_TOKEN.value, "its card (train): 15,806 rows, 71,908,734 bytes"
    ),
    "hf://HuggingFaceH4/no_robots": DataSet(9_500, 300, "its card (train): 9,500 rows; the tokens are a guess"),
}


@dataclass(frozen=True)
class FineTune:
    """A shipped config and what it does not say itself."""

    title: str
    config: Path
    parameters: float
    adapter: float  # trained parameters beside the frozen model; 0: all are trained
    layers: int
    attention_width: int  # heads x head_dim
    model_gb: float
    checkpoint_gb: float
    gpus: int
    utilization: float  # of the dense bf16 peak; what is computed again counts as work
    utilization_source: str
    traces: str  # the spot traces that stand for its machines


FINE_TUNES = (
    FineTune(
        "Qwen3-0.6B, LoRA", RUNS / "qwen3-0.6b-lora.yaml", 596.0e6, 10.1e6, 28, 2048, 1.19, 0.121, 1, 0.30,
        "none, a guess; LoRA on Qwen-1.8B makes 39 % (its README: A100, 8 rows of 2048 tokens in 1.7 s)",
        "availability/1-node/*/*_v100_1.json",
    ),
    FineTune(
        "Qwen3-8B, QLoRA", RUNS / "qwen3-8b-qlora.yaml", 8190.7e6, 43.6e6, 36, 4096, 16.38, 0.262, 1, 0.38,
        "Q-LoRA on Qwen-7B (its README: A100, 8 rows of 2048 tokens in 7.0 s)",
        "availability/1-node/*/*_v100_1.json",
    ),
    FineTune(
        "Qwen3-8B, full", RUNS / "qwen3-8b-full-fsdp2.yaml", 8190.7e6, 0, 36, 4096, 16.38, 98, 8, 0.33,
        "Llama 3.1 8B on 8 H100 with FSDP and without torch.compile (torchtitan's benchmarks)",
        "availability/1-node/*/*_v100_8.json",
    ),
)  # fmt: skip


class Gpu(NamedTuple):
    bf16_tflops: float  # dense
    memory_gb: float


# NVIDIA's data sheets, without sparsity; B300 as B200, since sources differ.
# One that is not here has no bf16 (V100, T4, RTX6000) or an ARM host (GH200).
GPUS = {
    "A10": Gpu(125, 24),
    "A10G": Gpu(70, 24),
    "A100": Gpu(312, 40),
    "A100-80GB": Gpu(312, 80),
    "A6000": Gpu(155, 48),
    "B200": Gpu(2250, 180),
    "B300": Gpu(2250, 268),
    "H100": Gpu(989, 80),
    "H100 NVL": Gpu(835, 94),
    "H100 PCIe": Gpu(756, 80),
    "H200": Gpu(989, 141),
    "L4": Gpu(121, 24),
    "L40S": Gpu(362, 48),
    "RTX-6000-Ada": Gpu(364, 48),
    "RTX-PRO-6000": Gpu(504, 96),
    "RTX4090": Gpu(165, 24),
    "RTX5090": Gpu(210, 32),
}
