"""Scores a model on the demo's held-out orders: exact match of greedy answers, to the letter.

    python examples/demo/score.py MODEL_DIR [--rows 200] [--json]

MODEL_DIR is a full model or a LoRA adapter.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import orders

HERE = Path(__file__).parent
ANSWER_TOKENS = 48  # the longest right answer is about 25
SAMPLES = 3


def read_heldout(path: Path, limit: int) -> list[tuple[str, str]]:
    """(sentence, expected answer) of the first rows."""
    if not path.is_file():
        sys.exit(f"{path}: no such file (python examples/demo/make_data.py)")
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [(user["content"], assistant["content"]) for user, assistant in rows]


def load_model(folder: Path, base: Path) -> tuple[Any, Any]:
    """Model and tokenizer; an adapter is put on the base that it names, or on ``base`` when that is not here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        named = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
        base = named if named.is_dir() else base
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder)
    elif (folder / "config.json").is_file():
        base = folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    else:
        sys.exit(f"{folder}: neither a model nor an adapter (config.json or adapter_config.json)")
    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").is_file() else base)
    return model.eval(), tokenizer


def generate_answers(model: Any, tokenizer: Any, sentences: list[str]) -> list[str]:
    """Greedy answers, all rows in one batch."""
    import torch

    chats = [[{"role": "user", "content": sentence}] for sentence in sentences]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(folder: Path, base: Path, data: Path, limit: int) -> dict[str, Any]:
    """Exact matches, rows, and every answer."""
    pairs = read_heldout(data, limit)
    model, tokenizer = load_model(folder, base)
    started = time.monotonic()
    answers = generate_answers(model, tokenizer, [sentence for sentence, _ in pairs])
    rows = [
        {"order": sentence, "expected": expected, "answer": answer, "exact": orders.is_exact(answer, expected)}
        for (sentence, expected), answer in zip(pairs, answers, strict=True)
    ]
    exact = sum(row["exact"] for row in rows)
    generate_s = round(time.monotonic() - started, 2)
    return {"exact": exact, "rows": len(rows), "share": exact / len(rows), "generate_s": generate_s, "answers": rows}


def render(result: dict[str, Any]) -> str:
    """The score in one line, and a few rows."""
    lines = [f"exact match: {result['exact']}/{result['rows']} ({result['share']:.1%})".replace("%", " %")]
    for row in result["answers"][:SAMPLES]:
        lines.append(f"  order   {row['order']}")
        lines.append(f"  answer  {row['answer']}  {'right' if row['exact'] else 'wrong, expected ' + row['expected']}")
    return "\n".join(lines)


def main() -> None:
    """Parses, scores, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="for an adapter whose own is not here")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub, and no telemetry goes out
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    result = score(args.model, args.base, args.data, args.rows)
    print(json.dumps(result) if args.json else render(result))


if __name__ == "__main__":
    main()
