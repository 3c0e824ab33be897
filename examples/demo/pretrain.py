"""Makes the demo's base model: a tiny Llama that can talk about orders, and has never turned one into JSON.

    python examples/demo/pretrain.py --out examples/demo/base

It reads, as chat, sentences that are answered in other ways (in words, as a label, one question at a time,
said again) and receipts in JSON that belong to no sentence. No held-out order is among them.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import orders
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIALS = ("<pad>", "<end>", "<user>", "<assistant>")
PAD, END, USER, ASSISTANT = range(4)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% else %}<assistant>{% generation %}{{ message.content }}<end>{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def in_words(rng: random.Random, order: orders.Order) -> str:
    """The order said as facts, in any sequence of slots."""
    facts = [
        f"it is for {order.name}",
        f"the item is {order.item}",
        f"the count is {order.qty}",
        f"the size is {order.size or 'not said'}",
        f"the milk is {order.milk or 'not said'}",
    ]
    rng.shuffle(facts)
    return "; ".join(facts) + "."


def as_label(rng: random.Random, order: orders.Order) -> str:
    """The order as on the cup's label: slots in any sequence, one notation for all."""
    slots = [
        f"for={order.name}",
        f"item={order.item}",
        f"qty={order.qty}",
        f"size={order.size or 'null'}",
        f"milk={order.milk or 'null'}",
    ]
    rng.shuffle(slots)
    return " ".join(slots)


def ask(rng: random.Random, sentence: str, order: orders.Order) -> str:
    """A question about one slot of a sentence, and its answer."""
    question, answer = rng.choice(
        [
            ("Who is it for?", order.name),
            ("Which item?", order.item),
            ("How many?", str(order.qty)),
            ("Which size?", order.size or "not said"),
            ("Which milk?", order.milk or "not said"),
            ("Which milk?", order.milk or "not said"),  # the slot that is hardest to learn
        ]
    )
    return f"<user>{question} {sentence}<assistant>{answer}<end>"


def draw_text(rng: random.Random, pairs: Iterator[tuple[str, orders.Order]]) -> str:
    """One document of the pre-training text."""
    sentence, order = next(pairs)
    kind = rng.random()
    if kind < 0.10:
        return f"<assistant>{order.as_json()}<end>"  # a receipt on its own: what JSON looks like, said of nothing
    if kind < 0.40:
        return f"<user>{sentence}<assistant>{in_words(rng, order)}<end>"
    if kind < 0.65:
        return f"<user>Label: {sentence}<assistant>{as_label(rng, order)}<end>"
    if kind < 0.95:
        return ask(rng, sentence, order)
    return f"<user>Say again: {sentence}<assistant>{sentence}<end>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the texts: any text round-trips, the task's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    plain = [text.replace("<user>", "\n").replace("<assistant>", "\n").replace("<end>", "\n") for text in texts]
    tokenizer.train_from_iterator((line for text in plain for line in text.split("\n") if line), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocab_size: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """An untrained Llama of the demo's shape."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=END,
            bos_token_id=None,
        )
    )


def collate(documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids, and labels for what the assistant says: the sentences themselves are drawn at random, so that
    learning to foresee them would be learning noise."""
    width = max(map(len, documents))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in documents])
    said = (ids == ASSISTANT).cumsum(1).bool() & (ids != ASSISTANT) & (ids != PAD)
    return ids, ids.masked_fill(~said, -100)


@torch.inference_mode()
def share_right(model: LlamaForCausalLM, questions: list[list[int]]) -> float:
    """The share of questions of which every token of the answer is the likeliest one."""
    ids, labels = collate(questions)
    foreseen = model(input_ids=ids).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    return ((foreseen == wanted) | (wanted == -100)).all(1).float().mean().item()


def train(
    model: LlamaForCausalLM, documents: list[list[int]], questions: list[list[int]], args: argparse.Namespace
) -> None:
    """Plain next-token training; prints the loss, and how many questions on unseen orders it gets right."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(args.steps):
        ids, labels = collate(rng.sample(documents, args.rows))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            right = share_right(model, questions)
            spent = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.3f}  questions right {right:6.1%}  {spent:6.1f} s", flush=True)


def main() -> None:
    """Draws the text, trains tokenizer and model, saves both in bf16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=448)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="pinned, since their number changes sums")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    pairs = orders.draw_pairs(rng, held_out=False)
    texts = [draw_text(rng, pairs) for _ in range(60_000)]
    tokenizer = train_tokenizer(texts, args.vocab)
    documents = tokenizer(texts)["input_ids"]
    model = build_model(len(tokenizer), args.hidden, args.layers)
    tokens = sum(map(len, documents)) / len(documents)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {tokens:.1f} per text")
    unseen = orders.draw_pairs(random.Random(args.seed + 1), held_out=True)
    questions = [ask(rng, *next(unseen)) for _ in range(300)]
    train(model, documents, tokenizer(questions)["input_ids"], args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
