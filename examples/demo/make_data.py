"""Writes the demo's data: ``data/train.jsonl`` and ``data/heldout.jsonl`` (`messages` rows, no answer in both).

python examples/demo/make_data.py
"""

import argparse
import json
import random
from pathlib import Path

import orders

HERE = Path(__file__).parent


def draw_rows(seed: int, count: int, held_out: bool) -> list[dict[str, list[dict[str, str]]]]:
    """Distinct rows from one side of the split."""
    rows: dict[str, dict[str, list[dict[str, str]]]] = {}
    pairs = orders.draw_pairs(random.Random(seed), held_out)
    while len(rows) < count:
        sentence, order = next(pairs)
        rows.setdefault(sentence, orders.as_row(sentence, order))
    return list(rows.values())


def write_rows(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Parses, draws, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    write_rows(args.out / "train.jsonl", draw_rows(args.seed, args.train, held_out=False))
    write_rows(args.out / "heldout.jsonl", draw_rows(args.seed + 1, args.heldout, held_out=True))


if __name__ == "__main__":
    main()
