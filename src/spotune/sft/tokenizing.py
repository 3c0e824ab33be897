"""Which row, and which template, is at fault when a data set cannot be tokenized."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.machinefaults import is_machine_fault
from spotune.sft.faults import one_line
from spotune.sft.origins import Origins

# What a row, a template or a tokenizer can raise beside jinja's own errors.
_OF_THE_INPUT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, StopIteration)


@dataclass(frozen=True)
class Renderer:
    """How TRL turns a row into tokens.

    Attributes:
        processor: the tokenizer, or a multimodal model's processor.
        chat_template: replaces the processor's own, if it is not None.
        args: the SFTConfig.
    """

    processor: Any
    chat_template: str | None
    args: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def template(self) -> str:
        """Names the chat template."""
        path = self.args.chat_template_path
        return f"the chat template {path}" if path else "the model's chat template"

    def first_at_fault(self, dataset: Any) -> int | None:
        """The first row that cannot be rendered by itself; None where all can. Only the way to an error pays for it."""
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
            texts = [row["prompt"], row["prompt"] + row["completion"]] if "prompt" in row else []
            texts += [] if "prompt" in row else [row[self.args.dataset_text_field]]
            return all(self.processor(text=text) is not None for text in texts)
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"chat_template": self.chat_template, "tools": tools, **row.get("chat_template_kwargs", {})}
        if "prompt" not in row:
            return self._has_tokens(row["messages"], options)
        self.processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **options)
        return self._has_tokens(row["prompt"] + row["completion"], options)

    def _has_tokens(self, messages: Any, options: dict[str, Any]) -> bool:
        """Whether the assistant has one, where only these are trained on. Raises whatever the template does."""
        if not self.args.assistant_only_loss:
            self.processor.apply_chat_template(messages, tokenize=False, **options)
            return True
        found = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return 1 in found.get("assistant_masks", [1])


@contextmanager
def explained(config_path: str, dataset: Any, origins: Origins, renderer: Renderer) -> Iterator[None]:
    """Turns what TRL's preparation raises into an InputError; a fault of the machine stays what it is."""
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
    """What is wrong with the shape of a row that cannot be tokenized; empty where nothing is."""
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
    text, (where, key) = _text_of(error), place
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
    said = one_line(error) if isinstance(error, (LookupError, AttributeError)) or not text else text
    if _is_template_error(error) or _came_from_a_template(error):
        return InputError(where, f"{renderer.template} fails: {said}", key=key)
    return InputError(where, f"cannot be read or tokenized: {said}", key=key)


def _text_of(error: BaseException) -> str:
    """The error's message; of one in a data loader's process torch gives the whole traceback."""
    text = str(error)
    if not (text.startswith("Caught ") and "in DataLoader worker process" in text):
        return text
    return text.strip().rpartition("\n")[2].partition(": ")[2]


def _came_from_a_template(error: BaseException) -> bool:
    """Whether the error was raised while jinja rendered."""
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
