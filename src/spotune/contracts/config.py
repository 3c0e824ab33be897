"""One YAML file -> one flat, checked config: TRL's own keys, plus ``data``, ``data_limit``, ``profiles``.

Used by the launcher at submission and by the guard of a run that was started by hand. Keys and types
come from ``schema.json``, generated from the pinned TRL, so that a typo costs milliseconds.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spotune.contracts.configkeys import check_keys, one_of, schema
from spotune.contracts.configwhole import check_whole
from spotune.contracts.errors import InputError, shown
from spotune.contracts.yamlonly import refuse_endless

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
        The flat config without ``profiles``. Raises InputError for anything that is not right.
    """
    raw = read_yaml(path)
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(overlay, dict) for overlay in profiles.values()):
        raise InputError(path, "must map names to settings", key="profiles", remedy="profiles: {dev: {max_steps: 30}}")
    for name, overlay in profiles.items():
        if not isinstance(name, str):
            raise InputError(path, f"the name {shown(name)} is not text", key="profiles", remedy="write it in quotes")
        if "profiles" in overlay:
            raise InputError(path, "profiles do not nest", key=f"profiles.{name}.profiles")
        check_keys(overlay, f"{path}: profiles.{name}")
    if profile and profile not in profiles:
        raise InputError(path, f"no profile {shown(profile)}", key="profiles", remedy=one_of(profiles) or "it has none")
    chosen = profile or (default_profile if default_profile in profiles else "")
    config = {**raw, **(profiles[chosen] if chosen else {}), **parse_overrides(overrides)}
    check_keys(config, path)
    check_whole(config, path)
    return config


def overlay(config: Mapping[str, Any], overrides: Iterable[str], where: object) -> dict[str, Any]:
    """A resolved config with ``key=value`` overrides on top, checked again; raises InputError."""
    changed = {**config, **parse_overrides(overrides)}
    check_keys(changed, where)
    check_whole(changed, where)
    return changed


def read_yaml(path: str | Path, remedy: str = "model_name_or_path: …", may_be_empty: bool = False) -> dict[str, Any]:
    """A YAML mapping; raises InputError naming file and line. ``remedy``: the start of such a file."""
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_unique_loader())
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # a value that looks like a date and is none; brackets without end
        raise InputError(path, f"not YAML: {error}") from error
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
            value = f"[{', '.join(values)}]" if kinds == "array" else " ".join(values) or "true"
        overrides.append(f"{name}={value}")
    return overrides
