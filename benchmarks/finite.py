"""What it costs to see that weights are finite: at a snapshot, at each step, and before the certificate.

    .venv-train/bin/python benchmarks/finite.py [--parameters 200] [--device cpu]

Times are the fastest of several rounds: other work on the machine only makes them longer.
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from spotune.guard.finish import has_not_finite
from spotune.sft.boundary import Finite, all_finite

ROUNDS = 15
WIDTH = 1 << 20  # elements of a tensor
BLOCK = 1 << 20  # bytes, as the guard reads them


def fastest_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that ``work`` takes, its kernels included."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    return min(found)


def snapshot(millions: int, device: torch.device) -> None:
    """The look at the weights."""
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(WIDTH, device=device).to(dtype) for _ in range(millions * 10**6 // WIDTH)]
        count = len(weights) * WIDTH / 1e6
        print(f"{count:.0f} M parameters, {dtype}: {fastest_ms(lambda held=weights: all_finite(held), device):.1f} ms")


def step(device: torch.device) -> None:
    """The flag that a step leaves: one loss and one norm."""
    finite = Finite()
    finite.fault(
        SimpleNamespace(
            state=SimpleNamespace(global_step=0),
            args=SimpleNamespace(world_size=1),
            model=torch.nn.Linear(1, 1).to(device),
        )
    )
    loss, norm = torch.tensor(1.0, device=device), torch.tensor(1.0, device=device)

    def hundred() -> None:
        for number in range(100):
            finite.note(loss)
            finite.note(norm)
            finite.end_step(number, was_skipped=False)

    print(f"a step's flag: {fastest_ms(hundred, device) / 100 * 1e3:.0f} us")


def certificate() -> None:
    """What the guard's look adds to the hash that it takes anyway; no torch."""
    cpu = torch.device("cpu")
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        size = BLOCK // dtype.itemsize
        blocks = [torch.randn(size).to(dtype).view(torch.uint8).numpy().tobytes() for _ in range(64)]
        look = fastest_ms(lambda held=blocks, name=name: [has_not_finite(block, name) for block in held], cpu)
        digest = fastest_ms(lambda held=blocks: [hashlib.sha256(block).digest() for block in held], cpu)
        print(f"{name}: {look / 64 * 1024 / 1e3:.2f} s a GiB, beside {digest / 64 * 1024 / 1e3:.2f} s for its sha256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200, help="in millions")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{device.type}, {torch.get_num_threads()} threads")
    snapshot(args.parameters, device)
    step(device)
    certificate()


if __name__ == "__main__":
    main()
