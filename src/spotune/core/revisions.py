"""The record in force of a run, its revisions, and which changes need a flag."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotune.core.config_keys import bool_of, number_of, schema
from spotune.core.errors import InputError
from spotune.core.fingerprint import DATA_KEYS, MODEL_KEYS
from spotune.core.keys import Keys, commit_of, revision_of
from spotune.core.records import Commit, RunRecord, read_mark
from spotune.core.store import Store

# What differs between two records of one run, and what of it may change without being asked for.
#
# Keys that may change freely (``FREE``), since what was trained so far is what it would have been with them:
#
# * training length: later steps are more of the same. A schedule that ends with the training is stretched.
# * logging: nothing of it reaches the weights.
# * saving: when a checkpoint is taken and where the result goes; every checkpoint holds the whole state.
# * what spotune does not follow (``resume_from_checkpoint``, ``save_only_model``, ``enable_jit_checkpoint``).
# * the budget and ``--stall-after``: they say when training is interrupted, not what it is.
# * ``num_processes``: as many as the next machine has. Whether the global batch is kept is decided at the restore.
# * evaluation, as long as it only looks: it does not move training's randomness, and its rows are held out whether it
#   runs or not. Not where the best model is kept, and not under a schedule that follows the metric.
#
# Everything else (model, data, optimizer, batch, precision, seeds, loading, ``env``) makes another training of it.

FLAG = "--allow-config-change"
LENGTH = frozenset("max_steps num_train_epochs".split())
LOGGING = frozenset(
    "logging_strategy logging_first_step logging_steps logging_nan_inf_filter report_to run_name project disable_tqdm"
    " log_level log_level_replica log_on_each_node include_num_input_tokens_seen skip_memory_metrics"
    " trackio_space_id trackio_bucket_id trackio_static_space_id".split()
)
SAVING = frozenset(
    "save_every save_strategy save_steps save_total_limit save_on_each_node output_dir push_to_hub hub_model_id"
    " hub_strategy hub_token hub_private_repo hub_always_push hub_revision merge_adapter keep_every".split()
)
NOT_FOLLOWED = frozenset("resume_from_checkpoint save_only_model enable_jit_checkpoint".split())
EVALUATION = frozenset(
    "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_packing"
    " eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size batch_eval_metrics"
    " prediction_loss_only include_for_metrics".split()
)
BUDGET, STALL_AFTER = "budget", "stall_after"  # no keys of a config, as little as save_every
FREE = LENGTH | LOGGING | SAVING | NOT_FOLLOWED | {"num_processes", BUDGET, STALL_AFTER}
RENAMED = {  # by transformers 5.24: the old name -> the new one
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_FOLLOWS_THE_METRIC = ("reduce_lr_on_plateau", "greedy")
_SHOWN = 60  # characters of a value
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key", re.IGNORECASE)
_NOT_SET = "not set"


@dataclass(frozen=True)
class KeyChange:
    """A key with another value, both as text for people; ``key`` names a place inside a value as ``data[0].weight``."""

    key: str
    before: str
    after: str
    is_free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Change:
    """What differs. Falsy when nothing does.

    Attributes:
        data, model: files whose contents differ.
        versions: libraries that decide the order of rows, ``datasets 5.0.1 -> 5.2.0``.
    """

    keys: tuple[KeyChange, ...] = ()
    data: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.data or self.model or self.versions)

    def __str__(self) -> str:
        parts = [str(change) for change in self.keys]
        parts += [f"data: {few(self.data)}"] if self.data else []
        parts += [f"model: {few(self.model)}"] if self.model else []
        parts += [f"{VERSIONS}: {', '.join(self.versions)}"] if self.versions else []
        return "; ".join(parts)

    @property
    def bound(self) -> list[str]:
        """What of it may not change by itself."""
        found = [change.key for change in self.keys if not change.is_free]
        found += ["data"] * bool(self.data) + ["model"] * bool(self.model)
        return found + [VERSIONS] * bool(self.versions)

    def as_differing(self) -> str:
        """``another config: seed: 1 -> 2``, ``other data: a.jsonl``, ``another model: model.safetensors``."""
        if self.keys:
            return f"another config: {self}"
        return f"{'other' if self.data or not self.model else 'another'} {self}"

    def as_followed(self) -> str:
        """The change, and what it does to the position in the data."""
        moves = self.data or any(top_level(change.key) in DATA_KEYS for change in self.keys)
        if moves:
            return f"{self}; goes on at the same step and position, now in the new data"
        if self.versions:
            return f"{self}; goes on at the same step and position, rows may come in another order"
        return str(self)


def compare(before: RunRecord, after: RunRecord) -> Change:
    """What differs between two records of one run. A model that nobody took a fingerprint of is taken as unchanged."""
    changes = compare_configs(
        {**before.config, **_of_the_command_line(before)},
        {**after.config, **_of_the_command_line(after)},
    )
    tops = {top_level(change.key) for change in changes}
    data: tuple[str, ...] = ()
    if before.data_sha256 != after.data_sha256 and not tops & set(DATA_KEYS):
        data = changed_files(before.data_files, after.data_files, "url") or ("its fingerprint",)
    model: tuple[str, ...] = ()
    if before.model_sha256 and before.model_sha256 != after.model_sha256 and not tops & set(MODEL_KEYS):
        model = changed_files(before.model_files, after.model_files, "name") or ("its fingerprint",)
    return Change(changes, data, model)


def _of_the_command_line(record: RunRecord) -> dict[str, Any]:
    """What was asked for beside the config."""
    return {
        "save_every": record.save_every or None,
        STALL_AFTER: record.stall_after or None,
        BUDGET: record.budget_usd,
    }


def admit(change: Change, allowed: bool, where: object, what: str, remedy: str) -> list[str]:
    """The bound part of a change, when it is allowed or empty; raises InputError naming every change."""
    if change.bound and not allowed:
        raise InputError(where, f"{what} {change.as_differing()}", remedy=remedy)
    return change.bound


def compare_configs(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[KeyChange, ...]:
    """The keys that differ in meaning, sorted: a default that is written out is none, and ``1e-3`` is 0.001.

    A key under its old name is the same key.
    """
    before, after = _renamed(before), _renamed(after)
    free = FREE | (EVALUATION if _only_looks(before) and _only_looks(after) else frozenset())
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = _leaves(key, _value(key, before)), _leaves(key, _value(key, after))
        found += [
            KeyChange(leaf, _shown(leaf, old), _shown(leaf, new), key in free)
            for leaf in sorted(old.keys() | new.keys())
            if leaf not in old or leaf not in new or not _is_same(key, old[leaf], new[leaf])
        ]
    return tuple(found)


def changed_files(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]], by: str) -> tuple[str, ...]:
    """The files that differ, by name, with a word on those that came or went."""
    old, new = ({str(file.get(by)): dict(file) for file in files} for files in (before, after))
    changed = [name for name in old if name in new and new[name] != old[name]]
    added = [f"{name} (added)" for name in new if name not in old]
    gone = [f"{name} (gone)" for name in old if name not in new]
    return (*changed, *added, *gone)


def few(names: tuple[str, ...], most: int = 4) -> str:
    """The first names, and how many more there are."""
    listed = ", ".join(names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def top_level(key: str) -> str:
    return re.split(r"[.\[]", key, maxsplit=1)[0]


def _only_looks(config: Mapping[str, Any]) -> bool:
    """Whether an evaluation has no say in the result."""
    keeps_best = _canonical("load_best_model_at_end", _value("load_best_model_at_end", config))
    return not keeps_best and config.get("lr_scheduler_type") not in _FOLLOWS_THE_METRIC


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under today's names. Like transformers, takes the new name's value where both are given."""
    old = {new: config[name] for name, new in RENAMED.items() if name in config}
    rest = {key: value for key, value in config.items() if key not in RENAMED}
    return old | {key: value for key, value in rest.items() if value is not None or key not in old}


def _value(key: str, config: Mapping[str, Any]) -> Any:
    """The key's value, else its default: TRL still gives that to the old name."""
    named = next((name for name, new in RENAMED.items() if new == key), key)
    return config[key] if key in config else schema()["properties"].get(named, {}).get("default")


def _leaves(key: str, value: Any) -> dict[str, Any]:
    """The places inside a value, each with its plain value; None has none."""
    if isinstance(value, Mapping) and value:
        below = [_leaves(f"{key}.{name}", inner) for name, inner in value.items()]
        return {place: leaf for leaves in below for place, leaf in leaves.items()}
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        below = [_leaves(f"{key}[{index}]", entry) for index, entry in enumerate(value)]
        return {place: leaf for leaves in below for place, leaf in leaves.items()}
    return {} if value is None else {key: value}


def _is_same(key: str, old: Any, new: Any) -> bool:
    old, new = _canonical(key, old), _canonical(key, new)
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def _canonical(key: str, value: Any) -> Any:
    """Text as the number or the yes or no that TRL reads from it."""
    kinds = schema()["properties"].get(key, {}).get("type") or ()
    if "boolean" in kinds and "string" not in kinds:
        answer = bool_of(value)
        return value if answer is None else answer
    if not isinstance(value, str) or "string" in kinds:
        return value
    try:
        return float(value) if "integer" in kinds or "number" in kinds else value
    except ValueError:
        return value


def shown_leaves(key: str, value: Any) -> dict[str, str]:
    """The places inside a value, each with its value as text for people; secrets are hidden."""
    leaves = _leaves(key, value)
    return {leaf: _shown(leaf, leaves) for leaf in leaves}


def _shown(key: str, leaves: Mapping[str, Any]) -> str:
    if key not in leaves:
        return _NOT_SET
    if key == "hub_token" or ("." in key and _SECRET.search(key)):
        return "(hidden)"
    value = leaves[key]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# The record that a run goes by: ``run.json`` as submitted, or the newest revision of it.
#
# ``run.json`` is never rewritten. What is changed on purpose while a run stands still is a whole record of its own,
# ``revisions/<n>.json``, create-only: whoever reads a run reads the highest one, and finds in all of them together
# what its checkpoints may have been made with.

VERSIONS = "versions"  # in ``RunRecord.allowed``


def record_in_force(store: Store, keys: Keys) -> RunRecord | None:
    """The newest revision, else ``run.json``; None when there is no such run."""
    submitted = record_as_submitted(store, keys)
    numbers = _numbers(store, keys) if submitted else []
    return _read(store, keys, keys.revision(numbers[-1])) if numbers else submitted


def record_as_submitted(store: Store, keys: Keys) -> RunRecord | None:
    """``run.json``; None when there is no such run. Raises BadRecord where it is another run's: a copied folder."""
    return _read(store, keys, keys.run)


def record_history(store: Store, keys: Keys) -> list[RunRecord]:
    """``run.json`` and all revisions, oldest first; empty when there is no such run."""
    submitted = record_as_submitted(store, keys)
    if submitted is None:
        return []
    later = [_read(store, keys, keys.revision(number)) for number in _numbers(store, keys)]
    return [submitted, *(record for record in later if record)]


def revised(before: RunRecord, wanted: RunRecord, by: str, at: float) -> RunRecord:
    """The next revision of ``before``: what ``wanted`` trains; who submitted it, when and at what price stay."""
    return replace(
        before,
        config_path=wanted.config_path,
        profile=wanted.profile,
        overrides=wanted.overrides,
        config=wanted.config,
        config_sha256=wanted.config_sha256,
        data_sha256=wanted.data_sha256,
        data_files=wanted.data_files,
        model_sha256=wanted.model_sha256,
        model_files=wanted.model_files,
        save_every=wanted.save_every or before.save_every,
        stall_after=wanted.stall_after or before.stall_after,
        budget_usd=before.budget_usd if wanted.budget_usd is None else wanted.budget_usd,
        month_usd=wanted.month_usd,
        month_of=wanted.month_of,
        revision=before.revision + 1,
        revised_at=at,
        revised_by=by,
        allowed=[],
    )


def write_revision(store: Store, keys: Keys, record: RunRecord) -> None:
    """Puts a revision in force; raises InputError when somebody else has made one in the meantime."""
    if not store.create(keys.revision(record.revision), record.to_bytes()):
        raise InputError(keys.run_id, "was changed by somebody else just now", remedy="try again")


def check_length(store: Store, keys: Keys, record: RunRecord) -> None:
    """Raises InputError for a training length that the newest checkpoint is beyond already."""
    steps = number_of(record.config.get("max_steps")) or 0
    newest = max((number for key in store.keys(keys.commits) if (number := commit_of(key))), default=(0, 0))[1]
    if 0 < steps < newest:
        what = f"{steps:.0f} steps, but the newest checkpoint is of step {newest} already"
        raise InputError(keys.run_id, what, key="max_steps", remedy=f"{newest} or more, or another --name")


def check_commit(commit: Commit, history: Sequence[RunRecord]) -> None:
    """Raises InputError for a checkpoint that was made with a config, data or model that the run never had.

    A fingerprint that is missing on either side, as in records of earlier versions, says nothing.
    """
    names = ("config_sha256", "data_sha256", "model_sha256")

    def fits(record: RunRecord, name: str) -> bool:
        made_with, recorded = getattr(commit, name), getattr(record, name)
        return not made_with or not recorded or made_with == recorded

    if any(all(fits(record, name) for name in names) for record in history):
        return
    wrong = [name.removesuffix("_sha256") for name in names if not any(fits(record, name) for record in history)]
    where = Keys(commit.run_id).commit(commit.attempt, commit.step)
    what = f"made with another {' and '.join(wrong) or 'config, data and model'} than this run has or ever had"
    raise InputError(where, what, remedy="submit it as a new run, under another name")


def allows_other_versions(commit: Commit, history: Sequence[RunRecord]) -> bool:
    """Returns whether a revision made after the commit lets the run go on under other versions of its libraries."""
    return any(VERSIONS in record.allowed and record.revision > commit.revision for record in history)


def refused_versions(store: Store, keys: Keys) -> tuple[str, ...]:
    """Returns the changed libraries that the run failed because of, ``datasets 5.0.1 -> 5.2.0``; empty for none."""
    mark = read_mark(store, keys.failed)
    return tuple(mark.versions) if mark else ()


def _numbers(store: Store, keys: Keys) -> list[int]:
    return sorted(number for key in store.keys(keys.revisions) if (number := revision_of(key)))


def _read(store: Store, keys: Keys, key: str) -> RunRecord | None:
    data = store.read(key)
    if data is None:
        return None
    return RunRecord.from_bytes(data, key)
