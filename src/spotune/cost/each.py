"""Requests to a bucket, many at a time where each takes its time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

AT_A_TIME = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(bucket: str, call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """In threads where the bucket is far away; a disk has answered before a thread would."""
    if bucket.startswith("file://"):
        return list(map(call, items))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(call, items))
