"""Versions of the libraries that decide which rows a step trains on, and in which order.

A checkpoint holds a position in the data, not the rows. Under another version of one of these libraries the same seed
may give another order: then a resumed run trains some rows twice and others never. So a commit records the versions,
and a resume under others is refused like a changed config.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

ORDER_LIBRARIES = (
    "datasets",  # shuffles and splits; its shuffle changed between 5.0.1 and 5.2.0
    "numpy",  # draws the permutations of datasets' shuffle
    "torch",  # draws the permutation of each epoch, and the seeds of loader processes
    "accelerate",  # deals batches to the ranks, and skips them at a resume
    "transformers",  # chooses the sampler, and how many batches a resume skips
    "trl",  # tokenizes, truncates and packs: decides what a row is
)
# Recorded for people. peft and wandb never see the order of rows. spotune's own code is recorded with the run (code/).
OTHER_LIBRARIES = ("peft", "spotune")


def installed_versions() -> dict[str, str]:
    """Returns the versions that a commit records, of those libraries that this Python has. Imports none of them."""
    found = {}
    for name in (*ORDER_LIBRARIES, *OTHER_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def changed_versions(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns ``datasets 5.0.1 -> 5.2.0`` for each library that may have changed the order of rows.

    A library that either side does not name is taken as unchanged: commits of earlier versions do not name numpy. The
    builds of one version (``2.13.0+cpu``, ``2.13.0+cu130``) count as the same.
    """
    return [
        f"{name} {before[name]} -> {after[name]}"
        for name in ORDER_LIBRARIES
        if name in before and name in after and _release(before[name]) != _release(after[name])
    ]


def _release(text: str) -> str:
    return text.partition("+")[0]
