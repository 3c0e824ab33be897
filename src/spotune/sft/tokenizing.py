"""Tokenizes data with TRL's own code, reports the loss of rows, and refuses what the model cannot train on.

TRL prepares a data set in one go: tokenize, label, truncate, drop, pack, shuffle. Here it does the first two, the rows
are counted while they still are the rows of the sources, and then it does the rest. Its maps stay the same in the same
order, so weights and cached files are those of ``trl sft``.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spotune.core.errors import InputError
from spotune.core.protocol import EventLog
from spotune.core.store.faults import is_machine_fault
from spotune.sft import row_counts
from spotune.sft.preflight import one_line

# The errors of a row, a template or a tokenizer, beside jinja's own.
_OF_THE_INPUT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, StopIteration)


@dataclass(frozen=True)
class Renderer:
    processor: Any  # the tokenizer, or a multimodal model's processor
    chat_template: str | None  # replaces the processor's own unless it is None
    args: Any  # the SFTConfig

    def first_at_fault(self, dataset: Any) -> int | None:
        """Returns the first row that cannot be rendered by itself, else None. Called only after an error."""
        for index, row in enumerate(dataset):
            try:
                if not self._is_renderable(row):
                    return index
            except Exception:
                return index
        return None

    def _is_renderable(self, row: dict[str, Any]) -> bool:
        from trl import is_conversational, maybe_convert_to_chatml

        row = maybe_convert_to_chatml(row)
        if not is_conversational(row):
            if "prompt" in row:
                texts = [row["prompt"], row["prompt"] + row["completion"]]
            else:
                texts = [row[self.args.dataset_text_field]]
            return all(self.processor(text=text) is not None for text in texts)
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"chat_template": self.chat_template, "tools": tools, **row.get("chat_template_kwargs", {})}
        if "prompt" not in row:
            return self._has_tokens(row["messages"], options)
        self.processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **options)
        return self._has_tokens(row["prompt"] + row["completion"], options)

    def _has_tokens(self, messages: Any, options: dict[str, Any]) -> bool:
        """Returns False if the loss needs tokens of the assistant and there are none. Raises the template's errors."""
        if not self.args.assistant_only_loss:
            self.processor.apply_chat_template(messages, tokenize=False, **options)
            return True
        found = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return 1 in found.get("assistant_masks", [1])


@contextmanager
def explained(config_path: str, dataset: Any, origins: row_counts.Origins, renderer: Renderer) -> Iterator[None]:
    """Turns errors of TRL's preparation into an InputError, but not faults of the machine."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        is_of_the_input = isinstance(error, _OF_THE_INPUT) or _is_template_error(error) or _lacks_assistant(error)
        if not is_of_the_input or is_machine_fault(error):
            raise
        place, misfit = (origins.names[0] if origins.is_streamed else config_path, "data"), ""
        if not origins.is_streamed and (index := renderer.first_at_fault(dataset)) is not None:
            source, number = origins.where(index)
            place, misfit = (source, f"row {number}"), misfit_of(dataset[index], renderer.args.dataset_text_field)
        raise _as_input_error(error, misfit, config_path, place, renderer) from error


def misfit_of(row: Mapping[str, Any], text_field: str) -> str:
    """Returns what is wrong with the shape of a row that cannot be tokenized; else ""."""
    named = [name for name in ("prompt", "completion", "messages", "conversations", text_field) if name in row]
    if not named:
        return f"it has no column {text_field!r}, messages, or prompt and completion, only {', '.join(row)}"
    if "prompt" in row and "completion" not in row:
        return "it has a prompt and no completion"
    if missing := [name for name in named if row[name] is None]:
        return f"{missing[0]} is missing"
    if "prompt" in row and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        kinds = ["text" if isinstance(row[name], str) else "a list of messages" for name in ("prompt", "completion")]
        return f"prompt is {kinds[0]}, completion is {kinds[1]}: both must be text, or both messages"
    return ""


def _as_input_error(
    error: Exception, misfit: str, config_path: str, place: tuple[str, str], renderer: Renderer
) -> InputError:
    text, (where, key) = str(error), place
    if text.startswith("Caught ") and "in DataLoader worker process" in text:  # torch gives the whole traceback
        text = text.strip().rpartition("\n")[2].partition(": ")[2]
    if misfit:
        return InputError(where, misfit, key=key)
    if "chat_template" in text and "not set" in text:
        remedy = "chat_template_path: a .jinja file or the id of a model that has one"
        what = "the model has no chat template, which messages need"
        return InputError(config_path, what, key="model_name_or_path", remedy=remedy)
    if _lacks_assistant(error):
        remedy = "a chat_template_path with {% generation %}, and an assistant's turn in every row"
        what = "assistant_only_loss finds no tokens of the assistant"
        return InputError(where, what, key=key, remedy=remedy)
    if isinstance(error, StopIteration):
        return InputError(config_path, "there are no rows", key="data")
    message = one_line(error) if isinstance(error, (LookupError, AttributeError)) or not text else text
    if _is_template_error(error) or _came_from_a_template(error):
        path = renderer.args.chat_template_path
        template = f"the chat template {path}" if path else "the model's chat template"
        return InputError(where, f"{template} fails: {message}", key=key)
    return InputError(where, f"cannot be read or tokenized: {message}", key=key)


def _came_from_a_template(error: BaseException) -> bool:
    frames = error.__traceback__
    while frames is not None:
        if "jinja2" in frames.tb_frame.f_code.co_filename.replace("\\", "/").split("/"):
            return True
        frames = frames.tb_next
    return any(mark in str(error.__cause__) for mark in ("/jinja2/", "in top-level template"))  # of another process


def _is_template_error(error: BaseException) -> bool:
    return any(kind.__name__ == "TemplateError" for kind in type(error).__mro__)


def _lacks_assistant(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "assistant_only_loss" in str(error)


SETS = {"train": "training", "eval": "evaluation"}  # TRL's name -> ours


class Preparation:
    """Prepares the data sets of one trainer. ``origins`` are by TRL's name of the data set, ``train`` or ``eval``.

    ``events`` is rank 0's log, None on the other ranks, which report nothing.
    """

    def __init__(self, origins: Mapping[str, row_counts.Origins], config_path: str, events: EventLog | None) -> None:
        self._origins, self._config_path, self._events = dict(origins), config_path, events
        self._counts: dict[str, row_counts.RowCount] = {}
        self._limits = row_counts.Limits(None, None)

    def prepare(
        self, trl_prepare: Callable[..., Any], dataset: Any, renderer: Renderer, packing: bool, name: str
    ) -> Any:
        """Returns the data set as ``trl_prepare``, SFTTrainer's own method, makes it. Raises InputError."""
        processor, args, origins = renderer.processor, renderer.args, self._origins.get(name)
        if origins is None:  # not one of the config's
            return trl_prepare(dataset, processor, args, packing, None, name)
        if origins.is_streamed:
            if self._events is not None:
                unknown = dict.fromkeys(("rows", "dropped", "truncated", "empty"))
                self._events.write("rows", set=SETS[name], sources=[{"source": origins.names[0], **unknown}])
                what = "is streamed, so that rows that are dropped or truncated are not counted"
                print(f"[spotune] {_named(origins.names[0], name)} {what}", file=sys.stderr)
            with explained(self._config_path, dataset, origins, renderer):
                return trl_prepare(dataset, processor, args, packing, None, name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        with explained(self._config_path, dataset, origins, renderer):
            tokenized = trl_prepare(dataset, processor, whole, False, None, name)
        self._count(tokenized, getattr(processor, "tokenizer", processor), args, packing, name)
        return trl_prepare(tokenized, processor, args, packing, None, name)

    def check_model(self, trainer: Any) -> None:
        """Raises InputError for a token or a length that the model has no embedding for."""
        if trainer._skip_prepare_dataset and not trainer._is_vision_dataset:  # the user's own tokens, not truncated
            args = copy.copy(trainer.args)
            args.max_length = None
            for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
                origins = self._origins.get(name)
                if origins is not None and not origins.is_streamed and "input_ids" in dataset.column_names:
                    self._count(dataset, trainer._tokenizer, args, False, name)
        self._limits = row_counts.limits_of(trainer.model)
        for count in self._counts.values():
            row_counts.check_rows(self._limits, trainer._tokenizer, count, self._config_path)
        row_counts.check_padding(self._limits, trainer, self._config_path)

    @contextmanager
    def reading(self, trainer: Any, name: str) -> Iterator[None]:
        """Turns errors while batches are read into an InputError: a stream's rows are tokenized only then."""
        origins = self._origins.get(name)
        if origins is None or not origins.is_streamed:
            yield
            return
        renderer = Renderer(trainer.processing_class, trainer.chat_template, trainer.args)
        with explained(self._config_path, None, origins, renderer):
            yield

    def check_streamed(self, trainer: Any, batches: Iterable[Any]) -> None:
        """Raises InputError for a token or a length of a stream that the model has no embedding for."""
        origins = self._origins.get("train")
        if origins is not None and origins.is_streamed:
            for batch in batches:
                row_counts.check_batch(self._limits, trainer._tokenizer, batch, origins.names[0], self._config_path)

    @contextmanager
    def settings(self, key: str) -> Iterator[None]:
        """Turns a library's error about the config's ``key`` into an InputError."""
        try:
            yield
        except (ValueError, TypeError, LookupError, ImportError) as error:
            if is_machine_fault(error):
                raise
            raise InputError(self._config_path, str(error), key=key) from error

    def check_evaluated(self, metrics: Mapping[str, float]) -> None:
        """Raises InputError if no row of a stream was left to evaluate on; for other data that is known before."""
        origins = self._origins.get("eval")
        if origins is not None and origins.is_streamed and not any(name.endswith("_loss") for name in metrics):
            what = "no row is left to evaluate on: none has an answer within max_length"
            raise InputError(self._config_path, what, key="max_length", remedy="a greater max_length, or other rows")

    def _count(self, dataset: Any, tokenizer: Any, args: Any, packing: bool, name: str) -> None:
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        count = row_counts.count_rows(dataset, self._origins[name], row_counts.rule_of(args, packing), special)
        self._counts[name] = count
        if self._events is not None:
            found = count.by_source()
            facts = ("source", "rows", "dropped", "truncated", "empty")
            sources = [{fact: getattr(one, fact) for fact in facts} for one in found]
            self._events.write("rows", set=SETS[name], max_length=args.max_length, sources=sources)
            for one in found:
                if losses := _losses_of(one, args.max_length):
                    print(f"[spotune] {_named(one.source, name)}: {one.rows} rows, {losses}", file=sys.stderr)
        if not count.used:
            raise self._none_left(count, args, name)

    def _none_left(self, count: row_counts.RowCount, args: Any, name: str) -> InputError:
        found = count.by_source()
        rows, empty, unfit = (sum(getattr(one, part) for one in found) for part in ("rows", "empty", "unfit"))
        which = f"none of the {rows} {SETS[name]} rows of {', '.join(one.source for one in found)}"
        if unfit:
            what = f"with {args.max_length} tokens {which} has an answer left"
            remedy = "a greater max_length, or shorter prompts"
            return InputError(self._config_path, what, key="max_length", remedy=remedy)
        if empty:
            what, remedy = f"{which} has any text once it is tokenized", "look at the rows and at the chat template"
            return InputError(self._config_path, what, key="data", remedy=remedy)
        remedy = "rows need an answer to learn from: look at them, completion_only_loss and assistant_only_loss"
        return InputError(self._config_path, f"{which} has a token that is trained on", key="data", remedy=remedy)


def _losses_of(count: row_counts.SourceCount, max_length: int | None) -> str:
    parts = []
    if count.unfit:
        parts.append(f"{count.unfit} dropped (the answer does not fit max_length {max_length})")
    if without := count.dropped - count.unfit:
        parts.append(f"{without} dropped (no token of them is trained on)")
    if count.truncated:
        parts.append(f"{count.truncated} truncated")
    if count.empty:
        parts.append(f"{count.empty} empty (no text is left once they are tokenized)")
    return ", ".join(parts)


def _named(source: str, name: str) -> str:
    return source if name == "train" else f"{source} ({SETS[name]})"
