"""``check`` and the machine give the same answer: neither takes what the other refuses.

``check`` is ``load_config``, without TRL. The machine is TRL's own parser with the ``__post_init__`` of its classes, as
``trl sft --config`` calls them, and after it our ``parse``. Both get the same YAML text.
"""

import copy
import dataclasses
import math
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from spotune.core.config import load_config
from spotune.core.config_keys import schema
from spotune.core.errors import InputError
from spotune.core.protocol import WorkerJob
from spotune.sft.arguments import effective

CLASSES = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
FIELDS = {entry.name: entry for cls in CLASSES for entry in dataclasses.fields(cls) if entry.init}
HINTS: dict[str, Any] = {name: hint for cls in CLASSES for name, hint in typing.get_type_hints(cls).items()}
HINTS |= {"trackio_static_space_id": bool | str | None}
HINTS |= {"fsdp": bool | str | list[str] | None, "lora_target_modules": str | list[str] | None}
BASE = {"model_name_or_path": "org/model", "dataset_name": "org/rows", "use_cpu": True}
# What TRL's classes raise for values that they cannot use. `check` knows all that a config alone decides.
REFUSALS = (ValueError, TypeError, ImportError, AttributeError, LookupError, OverflowError, OSError)

# Each as it is written in YAML.
VALUES = (
    *("1e1", "1.0e+1", "1.5", "0.5", "1.0", "0", "1", "-1", "2", "10", "010", "1_000", "4294967295", "4294967296"),
    *("2e-5", '"2e-5"', '"10"', '"1.5"', '"1e1"', "1e400", ".inf", ".nan", "inf", "nan", "1:30", "'1_0'", "' 7 '"),
    *("y", "n", "t", "f", "Y", "on", "off", "yes", "no", "true", "False", '"yes"', '"no"', '"on"', '"1"', '"0"', '"T"'),
    *("null", "~", '""', "none", "None", '"null"', "auto", "2026-11-30", "a", "A text", "[]", "[1]", "[a, b]", "['1']"),
    *("{}", "{a: 1}", "'{\"a\": 1}'", "'{'", "'[1]'", "[null]", "[[a]]", "!!binary aGk="),
)
# What only the machine can say: hardware, packages, files, and what one process can be.
THE_MACHINES_OWN = {
    "tf32": "needs an Ampere GPU",
    "deepspeed": "needs its package",
    "ddp_backend": "needs its library",
    "local_rank": "of one process",
    "env": "no key of TRL's classes",
    "use_cpu": "without it bf16 needs a GPU",
}
# Where `check` refuses what TRL's parser takes: only training would have tripped over it.
STRICTER = {
    "hub_token": "a secret would be written to run.json",
    "hub_model_id": "not a name on the hub",
    "model_name_or_path": "a run needs one",
    "dataset_name": "a run needs data",
    "pad_to_multiple_of": "0 and -1 pad to nothing",
    "optim_args": "Trainer splits it into name=value",
    "report_to": "Trainer knows no tracker of that name",
    "max_steps": "0 steps train nothing",
    "lr_scheduler_kwargs": "the schedule takes no such name",
    "activation_checkpointing_kwargs": "a text that is not JSON is no mapping",
    "gradient_checkpointing_kwargs": "a text that is not JSON is no mapping",
    "model_init_kwargs": "a text that is not JSON is no mapping",
    "dataset_kwargs": "a text that is not JSON is no mapping",
    "fsdp_config": "JSON in quotes that is no mapping",
    "accelerator_config": "JSON in quotes that is no mapping",
    "lora_target_modules": "an adapter of no layers",
    "lora_modules_to_save": "peft takes a text for a list of letters",
    "fsdp": "a number or a mapping is no way to say yes",
    "debug": "Trainer knows no such option",
    "liger_kernel_config": "an empty text is no mapping",
}
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # the name of a file, or what is in it
# What a key needs beside it to be taken.
BESIDE: dict[str, dict[str, Any]] = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_in_4bit": {"use_peft": True},
    "load_in_8bit": {"use_peft": True},
    "padding_free": {"packing": True},
    "fp16": {"bf16": False},
    "eval_on_start": {"eval_strategy": "steps"},
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 20},
    "dataset_streaming": {"max_steps": 5},
    "streaming": {"max_steps": 5},
}


def written(key: str, value: str, beside: dict[str, Any]) -> str:
    rest = {name: inner for name, inner in {**BASE, **beside}.items() if name != key}
    return yaml.safe_dump(rest) + f"{key}: {value}\n"


def checked(path: Path) -> dict[str, Any] | InputError:
    try:
        return load_config(path)
    except InputError as error:
        return error


class Parser(TrlParser):
    """TRL's parser, made once: it keeps a config's values as defaults, so that these are put back."""

    def __init__(self) -> None:
        super().__init__(CLASSES)
        self._before = [(action, action.default, action.required) for action in self._actions]

    def error(self, message: str) -> Any:
        raise ValueError(message)

    def read(self, path: Path) -> dict[str, Any] | Exception:
        """The values that TRL's classes hold, or why it refuses."""
        for action, default, required in self._before:
            action.default, action.required = copy.deepcopy(default), required
        named = yaml.safe_load(path.read_text())
        if any(not isinstance(named.get(key), (dict, type(None))) for key in FILES):
            return OSError("no such file")  # and a number would be the number of an open one
        try:
            found = self.parse_args_and_config(["--config", str(path)])
        except REFUSALS as error:
            return error
        return {name: value for one in found for name, value in vars(one).items()}


@pytest.fixture(scope="module")
def parser() -> Parser:
    return Parser()


def by_machine(parser: Parser, config: dict[str, Any], folder: Path) -> dict[str, Any] | Exception:
    """What ``parse`` gives to TRL, read by TRL."""
    job = WorkerJob(run_id="a-run", attempt=1, config=config, config_path="c.yaml", cache=str(folder))
    path = folder / "effective.yaml"
    path.write_text(yaml.safe_dump(effective(job, folder)))
    return parser.read(path)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that the class says: what training can rely on."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(fits(inner, typing.get_args(hint)[0]) for inner in value)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) or (issubclass(kind, Enum) and isinstance(value, str))


def is_sensible(key: str, value: Any) -> bool:
    """Whether training can use what TRL's parser let through: the type, the choices and the limits of the key."""
    rule = schema()["properties"][key]
    if value is None or not fits(value, HINTS[key]):
        return False
    if isinstance(value, Enum):
        value = value.value
    if "enum" in rule and value not in rule["enum"]:
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above = rule.get("minimum", -math.inf), rule.get("exclusiveMinimum", -math.inf)
        high, below = rule.get("maximum", math.inf), rule.get("exclusiveMaximum", math.inf)
        return bool(low <= value <= high and above < value < below)
    return True


# Keys that are settled between classes or replaced by us: their values afterwards say nothing about the text.
ADJUSTED = {
    "save_total_limit",
    "dataloader_pin_memory",
    "accelerator_config",
    "resume_from_checkpoint",
    "push_to_hub",
    "enable_jit_checkpoint",
    "save_only_model",
}


def _alike(key: str) -> str:
    """What decides how a key's values are read: keys with the same rule of their own are tested by one of them."""
    rule = {name: part for name, part in schema()["properties"][key].items() if name not in ("description", "default")}
    return f"{rule} {HINTS[key]} {BESIDE.get(key)} {key if key in STRICTER else ''}"


KEYS = sorted(FIELDS.keys() - THE_MACHINES_OWN.keys())
FIRST = {_alike(key): key for key in reversed(KEYS)}.values()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("key", [key if key in FIRST else pytest.param(key, marks=pytest.mark.slow) for key in KEYS])
def test_one_key(key: str, parser: Parser, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    wrong = []
    for value in VALUES:
        for beside in [{}, BESIDE[key]] if key in BESIDE else [{}]:
            path.write_text(written(key, value, beside))
            ours, theirs = checked(path), parser.read(path)
            if isinstance(ours, dict):
                if key in FILES and isinstance(ours.get(key), str):
                    continue  # whether there is such a file the machine says
                got = by_machine(parser, ours, tmp_path)
                if isinstance(got, Exception):
                    wrong.append(f"{key}: {value}: check takes it, the machine says {got}")
                elif ours.get(key) is not None and key not in ADJUSTED and not fits(got[key], HINTS[key] | None):
                    wrong.append(f"{key}: {value}: the machine has {got[key]!r}")
                continue
            is_compared = beside == BESIDE.get(key, {}) and key not in STRICTER.keys() | ADJUSTED
            if is_compared and isinstance(theirs, dict) and is_sensible(key, theirs[key]):
                wrong.append(f"{key}: {value}: the machine takes it as {theirs[key]!r}, check says {ours}")
    assert not wrong, "\n".join(wrong)


STRATEGIES = st.sampled_from(["no", "steps", "epoch"])
STEPS = st.one_of(st.integers(1, 40), st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 1.0, 1.5, 2.0, "1e1", "20", None]))
TOGETHER = {
    **{f"{name}_strategy": STRATEGIES for name in ("eval", "logging")},
    "save_strategy": st.sampled_from(["no", "steps", "epoch", "best"]),
    **{f"{name}_steps": STEPS for name in ("eval", "logging", "save")},
    **{key: st.booleans() for key in ("load_best_model_at_end", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval")},
    "lr_scheduler_type": st.sampled_from(["linear", "reduce_lr_on_plateau", "greedy"]),
    "dataloader_num_workers": st.integers(0, 1),
    "dataloader_prefetch_factor": st.sampled_from([1, 2, None]),
    "metric_for_best_model": st.sampled_from(["loss", "eval_mean_token_accuracy", None]),
    "load_in_4bit": st.booleans(),
    "load_in_8bit": st.booleans(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(given_keys=st.fixed_dictionaries({}, optional=TOGETHER))
@example(given_keys={"load_best_model_at_end": True})
@example(given_keys={"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 15})
@example(given_keys={"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3})
@example(given_keys={"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 10})
@example(given_keys={"logging_steps": 1.5})
@example(given_keys={"logging_steps": 1.5, "logging_strategy": "epoch"})
def test_keys_together(given_keys: dict[str, Any], parser: Parser, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**BASE, "use_peft": True, **given_keys}))
    ours, theirs = checked(path), parser.read(path)
    if isinstance(ours, InputError) and isinstance(theirs, dict):
        stricter = ("metric_for_best_model: missing", "null is not", "is too small")  # all of them Trainer refuses
        assert any(reason in str(ours) for reason in stricter), ours
    assert isinstance(ours, InputError) or isinstance(theirs, dict), theirs
    if isinstance(ours, dict):
        assert isinstance(by_machine(parser, ours, tmp_path), dict)
