"""A progress bar on stderr for long work, where somebody looks."""

from typing import Any, Self

import click

FEWEST = 200  # below, it is done before a bar can be read


class ProgressBar:
    """Called with what is done and what there is to do; where that is little, or nobody looks, nothing is drawn."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            err = click.get_text_stream("stderr")
            if total < FEWEST or not err.isatty():
                return
            self._bar = click.progressbar(length=total, label=self._label, file=err)
            self._bar.render_progress()
        self._bar.update(done - self._bar.pos)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()
