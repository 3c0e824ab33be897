"""One YAML file -> one flat, checked config: TRL's own keys, plus ``data``, ``data_limit``, ``profiles``.

Used by the launcher at submission and by the guard of a run that was started by hand. Keys, types and rules are the
pinned TRL's, so that what the machine would refuse costs milliseconds. All that is wrong is reported at once.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spotune.contracts.configkeys import key_faults, recorded, schema
from spotune.contracts.configvalues import Fault, one_of
from spotune.contracts.configwhole import missing_faults, whole_faults
from spotune.contracts.errors import InputError, raise_all, shown
from spotune.contracts.foreign import foreign_data, foreign_text
from spotune.contracts.userfiles import read_user_file
from spotune.contracts.yamlonly import refuse_dates, refuse_endless

OVERRIDE = "--set"


def load_config(
    path: str | Path, profile: str = "", overrides: Iterable[str] = (), default_profile: str = ""
) -> dict[str, Any]:
    """Reads, overlays and checks a config.

    Args:
        path: the YAML file.
        profile: must be one of the file's ``profiles`` when given.
        overrides: ``key=value`` each, the value as YAML; they win over the profile.
        default_profile: used when ``profile`` is empty and the file has it.

    Returns:
        The flat config without ``profiles``. Raises InputError for all that is wrong with it.
    """
    raw = read_config(path)
    profiles = profiles_of(raw, path)
    raw.pop("profiles", None)
    if profile and profile not in profiles:
        raise InputError(path, f"no profile {shown(profile)}", key="profiles", remedy=one_of(profiles) or "it has none")
    chosen = profile or (default_profile if default_profile in profiles else "")
    given, overlay = parse_overrides(overrides), profiles[chosen] if chosen else {}
    config = {**raw, **overlay, **given}
    faults = list(_faults_of(config, path, overlay.keys() - given.keys(), f"{path}: profiles.{chosen}"))
    for name, other in profiles.items():
        if name != chosen:
            faults += _as_errors(key_faults(other), f"{path}: profiles.{name}")
    raise_all(faults)
    return recorded(config)


def overlay(config: Mapping[str, Any], overrides: Iterable[str], where: object) -> dict[str, Any]:
    """A resolved config with ``key=value`` overrides on top, checked again; raises InputError."""
    changed = {**config, **parse_overrides(overrides)}
    raise_all(_faults_of(changed, where))
    return recorded(changed)


def _faults_of(
    config: Mapping[str, Any], where: object, overlaid: Iterable[str] = (), overlay_is: object = ""
) -> Iterator[InputError]:
    """All that is wrong with a config; what comes from a profile (``overlaid``) is reported there."""
    places = dict.fromkeys(overlaid, overlay_is)
    dated = {}
    for key, value in config.items():
        try:
            refuse_dates(value, places.get(key, where), key)
        except InputError as error:
            dated[key] = error
    yield from dated.values()
    wrong = list(key_faults({key: value for key, value in config.items() if key not in dated}))
    faulty = frozenset([*dated, *(_top_level(fault.key) for fault in wrong)])
    missing = [] if faulty else missing_faults(config)  # an unknown key may be the one that is meant
    for fault in [*wrong, *missing, *whole_faults(config, faulty)]:
        place = places.get(_top_level(fault.key), where)
        yield InputError(place, fault.what, key=fault.key, remedy=fault.remedy)


def _as_errors(faults: Iterable[Fault], where: object) -> Iterator[InputError]:
    yield from (InputError(where, fault.what, key=fault.key, remedy=fault.remedy) for fault in faults)


def _top_level(key: str) -> str:
    return key.partition(".")[0].partition("[")[0]


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file as it is written; raises InputError for what is no mapping, or another tool's file."""
    try:
        raw = read_yaml(path)
    except InputError as error:
        raise foreign_text(path) or error from error
    if (foreign := foreign_data(raw, path)) is not None:
        raise foreign
    return raw


def profiles_of(raw: Mapping[str, Any], path: object) -> dict[str, dict[str, Any]]:
    """The overlays of a config by name; raises InputError for what cannot be one."""
    profiles = raw.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(isinstance(overlay, dict) for overlay in profiles.values()):
        raise InputError(path, "must map names to settings", key="profiles", remedy="profiles: {dev: {max_steps: 30}}")
    for name, overlay in profiles.items():
        if not isinstance(name, str):
            raise InputError(path, f"the name {shown(name)} is not text", key="profiles", remedy="write it in quotes")
        if "profiles" in overlay:
            raise InputError(path, "profiles do not nest", key=f"profiles.{name}.profiles")
        for key in overlay:
            if not isinstance(key, str):
                raise InputError(path, "keys are text", key=f"profiles.{name}.{shown(key)}")
    return profiles


def read_yaml(path: str | Path, remedy: str = "model_name_or_path: …", may_be_empty: bool = False) -> dict[str, Any]:
    """A YAML mapping; raises InputError naming file and line. ``remedy``: the start of such a file."""
    import yaml

    try:
        data = yaml.load(read_user_file(path), Loader=_unique_loader())
    except (ValueError, RecursionError) as error:  # a value that looks like a date and is none; brackets without end
        raise InputError(path, f"not YAML: {error}") from error
    except yaml.composer.ComposerError as error:  # also an alias of nothing
        what = "several documents" if "single document" in str(error.context) else f"not YAML: {error.problem}"
        raise InputError(path, what, remedy="one file for each" if what.startswith("several") else "") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(path, f"not YAML: {error.problem}", key=line) from error
    except yaml.YAMLError as error:
        raise InputError(path, f"not YAML: {error}") from error
    if data is None and may_be_empty:
        return {}
    if not isinstance(data, dict):
        raise InputError(path, "must be a mapping of keys to values", remedy=remedy)
    for key in data:
        if not isinstance(key, str):
            raise InputError(path, "keys are text", key=shown(key))
    refuse_endless(data, path)
    return data


@cache
def _unique_loader() -> type:
    """PyYAML's safe loader, but a key given twice is an error instead of the last one winning."""
    import yaml

    class UniqueLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = getattr(key_node, "value", None)
                if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                    if key in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"key {shown(key)} given twice", key_node.start_mark
                        )
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueLoader


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs -> a dict, values read as YAML (``max_steps=5``, ``packing=true``)."""
    import yaml

    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(OVERRIDE, f"{shown(override)} is not key=value", remedy="--set max_steps=50")
        try:
            parsed[key.strip().replace("-", "_")] = yaml.safe_load(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(OVERRIDE, f"the value {shown(text)} is not YAML", key=key) from error
    refuse_endless(parsed, OVERRIDE)
    return parsed


def parse_flags(flags: list[str]) -> list[str]:
    """TRL's own flags (``--learning_rate 1e-4 --packing``) -> ``key=value`` overrides."""
    overrides: list[str] = []
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise InputError("command line", f"unexpected {shown(flag)}", remedy="CONFIG [--key value]...")
        name, equals, value = flag[2:].partition("=")
        position += 1
        if not equals:
            values: list[str] = []
            while position < len(flags) and not flags[position].startswith("--"):
                values.append(flags[position])
                position += 1
            known = schema()["properties"]
            kinds = known.get(name.replace("-", "_"), {}).get("type", "boolean")
            if name.startswith(("no_", "no-")) and not values and name[3:].replace("-", "_") in known:
                name, values = name[3:], ["false"]
            elif not values and "boolean" not in kinds:
                raise InputError(f"--{name}", "needs a value")
            is_list = "array" in kinds and ("string" not in kinds or len(values) > 1)
            value = f"[{', '.join(values)}]" if is_list else " ".join(values) or "true"
        overrides.append(f"{name}={value}")
    return overrides
