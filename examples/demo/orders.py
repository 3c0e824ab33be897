"""The demo's task: a café order said in a sentence -> the same order as JSON. Generator and exact scorer.

    Could Mia get two large mochas with oat milk?
    {"name":"Mia","item":"mocha","qty":2,"size":"large","milk":"oat"}

Closed vocabulary, endless phrasing, one right answer to the letter, so a score means what it says.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

DRINKS = ("latte", "mocha", "cocoa", "chai", "matcha", "espresso")
FOODS = ("bagel", "muffin", "cookie", "scone", "brownie", "croissant")
SIZES = ("small", "medium", "large")
MILKS = ("oat", "soy", "almond", "whole")
QUANTITIES = {1: ("a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
# fmt: off
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon",
    "Kim", "Leo", "Mia", "Noa", "Oli", "Pia", "Ray", "Sue", "Tom", "Uma",
)
# fmt: on
FRAMES = (
    "Hi, {order} for {name}, please.",
    "Could {name} get {order}?",
    "{name} would like {order}.",
    "I'd like {order}, the name is {name}.",
    "{name} here: {order}, thanks.",
    "Can I have {order}? It's for {name}.",
)
HELD_OUT_SHARE = 8  # one answer in eight


@dataclass(frozen=True)
class Order:
    """One order; ``size`` and ``milk`` are None when nobody said them."""

    name: str
    item: str
    qty: int
    size: str | None
    milk: str | None

    def as_json(self) -> str:
        """The answer, to the letter."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @property
    def is_held_out(self) -> bool:
        """Whether this order is kept for scoring: by its answer, so that no held-out answer was ever trained on."""
        return zlib.crc32(self.as_json().encode()) % HELD_OUT_SHARE == 0


def draw_order(rng: random.Random) -> Order:
    """An order, each slot said about as often as not."""
    item = rng.choice(DRINKS if rng.random() < 0.6 else FOODS)
    return Order(
        name=rng.choice(NAMES),
        item=item,
        qty=rng.choice((1, 1, 2, 3, 4)),
        size=rng.choice(SIZES) if rng.random() < 0.6 else None,
        milk=rng.choice(MILKS) if item in DRINKS and rng.random() < 0.6 else None,
    )


def say(rng: random.Random, order: Order) -> str:
    """A sentence that asks for the order."""
    plural = "s" if order.qty > 1 else ""
    words = [rng.choice(QUANTITIES[order.qty]), order.size, order.item + plural]
    phrase = " ".join(word for word in words if word)
    if order.milk:
        phrase += rng.choice((" with {} milk", " made with {} milk")).format(order.milk)
    return rng.choice(FRAMES).format(order=phrase, name=order.name)


def draw_pairs(rng: random.Random, held_out: bool) -> Iterator[tuple[str, Order]]:
    """Endless (sentence, order) from one side of the split."""
    while True:
        order = draw_order(rng)
        if order.is_held_out == held_out:
            yield say(rng, order), order


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected JSON, character by character."""
    return answer.strip() == expected


def as_row(sentence: str, order: Order) -> dict[str, list[dict[str, str]]]:
    """One training row, in the ``messages`` format."""
    return {"messages": [{"role": "user", "content": sentence}, {"role": "assistant", "content": order.as_json()}]}
