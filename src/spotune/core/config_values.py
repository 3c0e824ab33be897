"""One value of a config, and which names its ``env:`` may set."""

import difflib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from spotune.core.errors import refuse, shown

# One value of a config, read as TRL's parser reads it from YAML.
#
# TRL gives YAML's own numbers, booleans and lists to its dataclasses as they are, and turns text into the key's type:
# ``int``, ``float``, or one of ten words for yes and no. YAML 1.1 decides what is text: ``1e1`` and ``1e-4`` are,
# ``yes`` and ``off`` are not, ``y`` and ``t`` are. What TRL takes without a look and trips over later is refused here.

_YES = ("yes", "true", "t", "y", "1")
_NO = ("no", "false", "f", "n", "0")
_NOTHING = ("none", "null")  # text that TRL reads as null, for a number that may be left open
_WORDS = {
    **{"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"},
    **{"array": "a list", "object": "a mapping"},
}


class Fault(NamedTuple):
    """What is wrong with a key, and what to write instead."""

    key: str
    what: str
    remedy: str = ""


def value_faults(key: str, value: Any, rule: Mapping[str, Any]) -> Iterator[Fault]:
    """Compares a value with its rule in the schema: kind, choices, limits, and what lies inside it."""
    kinds = kinds_of(rule)
    read = read_value(value, rule)
    if read is None:
        if value is None and kinds and "null" not in kinds:
            yield Fault(key, f"null is not {_spell(kinds)}", _instead_of_null(key, rule))
        return
    if kinds and not any(_is_kind(read, kind) for kind in kinds):
        yield Fault(key, f"{shown(value)} is not {_spell(kinds)}", _remedy(key, value, rule, kinds))
        return
    choices = rule.get("enum") or (rule.get("items", {}).get("enum") if isinstance(read, str) else None)
    if choices and read not in choices:
        near = difflib.get_close_matches(str(read), map(str, choices), n=1)
        named = one_of(str(choice) for choice in choices if choice)
        yield Fault(key, f"{shown(value)} is not known", f"did you mean {near[0]}?" if near else named)
        return
    yield from _limit_faults(key, value, read, rule)
    if isinstance(read, list) and "items" in rule and rule["items"].get("type") != "object":
        for index, inner in enumerate(read):
            yield from value_faults(f"{key}[{index}]", inner, rule["items"])
    if "properties" in rule:
        for name in mapping_of(read):
            if name not in rule["properties"]:
                yield Fault(f"{key}.{name}", "unknown key", one_of(rule["properties"]))


def read_value(value: Any, rule: Mapping[str, Any]) -> Any:
    """The value as the kind that the rule names; where it is of none of them, as it is."""
    kinds = kinds_of(rule)
    if "boolean" in kinds and (isinstance(value, (bool, int)) or "string" not in kinds):
        answer = bool_of(value)
        return value if answer is None else answer
    if "integer" in kinds or "number" in kinds:
        return _read_number(value, kinds)
    if "string" in kinds and "object" not in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and "items" in rule and rule["items"].get("type") != "object":
        return [read_value(inner, rule["items"]) for inner in value]
    return value


def _read_number(value: Any, kinds: set[str]) -> Any:
    """A number from a number or from text; text that is none stays text."""
    if isinstance(value, str) and "string" not in kinds:
        if "null" in kinds and value.lower() in _NOTHING:
            return None
        try:
            return int(value) if "number" not in kinds else float(value)
        except ValueError:
            return value
    if isinstance(value, float) and "number" not in kinds and value.is_integer():
        return int(value)
    return value


def bool_of(value: Any) -> bool | None:
    """Yes or no in one of TRL's words, or as 1 and 0; None for anything else."""
    if isinstance(value, str):
        word = value.lower()
        return True if word in _YES else False if word in _NO else None
    return bool(value) if isinstance(value, (bool, int)) and value in (0, 1) else None


def number_of(value: Any) -> float | None:
    """A number, also one that YAML 1.1 reads as text, infinite beyond a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf if isinstance(value, int) and value > 0 else -math.inf


def mapping_of(value: Any) -> dict[str, Any]:
    """A mapping that may be written as JSON; empty for anything else."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def kinds_of(rule: Mapping[str, Any]) -> set[str]:
    """The JSON types that a rule names; empty where it takes anything."""
    kinds = rule.get("type") or ()
    return {kinds} if isinstance(kinds, str) else set(kinds)


def one_of(names: Iterable[str]) -> str:
    """A remedy that lists what is known; empty for nothing."""
    listed = ", ".join(names)
    return f"one of {listed}" if listed else ""


def _limit_faults(key: str, value: Any, read: Any, rule: Mapping[str, Any]) -> Iterator[Fault]:
    number = number_of(read)
    if number is None:
        return
    low, above = rule.get("minimum"), rule.get("exclusiveMinimum")
    high, below = rule.get("maximum"), rule.get("exclusiveMaximum")
    if (low is not None and number < low) or (above is not None and number <= above):
        yield Fault(key, f"{shown(value)} is too small", f"at least {low}" if low is not None else f"above {above}")
    if (high is not None and number > high) or (below is not None and number >= below):
        yield Fault(key, f"{shown(value)} is too large", f"at most {high}" if high is not None else f"below {below}")


def _is_kind(value: Any, kind: str) -> bool:
    match kind:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            number = None if isinstance(value, str) else number_of(value)
            return number is not None and math.isfinite(number)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return False


def _remedy(key: str, value: Any, rule: Mapping[str, Any], kinds: set[str]) -> str:
    """What the user meant, where that can be told."""
    if isinstance(value, bool) and kinds & {"string"}:
        meant = "no" if value is False and "no" in rule.get("enum", ("no",)) else "yes"  # YAML 1.1 reads a bare no
        return f'write it in quotes: "{meant}"' if meant in rule.get("enum", (meant,)) else ""
    number = number_of(value)
    if "integer" in kinds and isinstance(value, str) and number is not None and number.is_integer():
        return f"write {key}: {int(number)}"
    if "array" in kinds and isinstance(value, str) and value and rule.get("items", {}).get("type") == "string":
        return f"write {key}: [{value}]"
    return ""


def _instead_of_null(key: str, rule: Mapping[str, Any]) -> str:
    """What to write where null is not taken: the word for nothing, or the default by leaving the key out."""
    default = rule.get("default")
    if default == "none":
        return f"write {key}: none"
    return "leave the key out" + ("" if default is None else f" for {json.dumps(default)}")


def _spell(kinds: set[str]) -> str:
    return " or ".join(word for kind, word in _WORDS.items() if kind in kinds) or "anything but null"


# Which names a config's ``env:`` may set. The launcher and the guard apply the same rule.
#
# A config is often somebody else's file, and a record in the bucket somebody else's writing. A name that decides which
# code runs, or where a token is sent, is refused unless the user allows it by name with ``--allow-env``.

FLAG = "--allow-env"
OWN = ("SPOTUNE_*", "SKYPILOT_*")  # never, with no flag

# None of these names code or a host, though a pattern below has them.
HARMLESS = frozenset(
    "PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONHASHSEED PYTHONIOENCODING PYTHONNOUSERSITE PYTHONSAFEPATH"
    " PYTHONTRACEMALLOC PYTHONUNBUFFERED PYTHONUTF8 ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH"
    " ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH".split()
)
# reason -> patterns of names, upper case. Families first: a library that nobody has thought of names its plugin alike.
REFUSED: dict[str, tuple[str, ...]] = {
    "decides what the loader loads": (
        *("LD_*", "DYLD_*", "GLIBC_TUNABLES", "GCONV_PATH", "GETCONF_DIR", "LOCPATH", "NLSPATH", "MALLOC_TRACE"),
        *("*_PRELOAD", "*LIBRARY_PATH", "*_PROVIDER_PATH", "*_INJECTION*_PATH", "*_MODULE*_PATH", "*_TOOL*_PATH"),
        *(
            "LIBRARY_PATH",
            "SASL_PATH",
            "HSA_TOOLS_LIB",
            "NIS_PATH",
            "*PLUGIN*",
            "*_MODULE_DIR*",
            "*_LIB",
            "*_LIBS",
            "*_LIBRARY",
        ),
        *("*_LIBRARIES", "*_LIBDIR", "*_LIB*_DIR", "*_SO", "*_DLL", "OMP_TOOL*", "NCCL_CONF_FILE", "OPENSSL_*"),
        *("LIBPATH", "SHLIB_PATH", "OCL_ICD_*", "VK_*", "KRB5_*", "OMPI_*", "OPAL_*", "PMIX_*", "PRTE_*", "NVSHMEM_*"),
        *("RDMAV_DRIVERS", "IBV_DRIVERS", "HADOOP_*", "ODBC*", "TVM_*", "DEEPSPEED_*_LIB*", "UCX_*MODULE*", "INTEL_*"),
    ),
    "decides which programs and modules run": (
        *("PYTHON*", "PATH", "HOME", "USER", "LOGNAME", "SHELL", "BASH*", "ENV", "IFS", "CDPATH", "PS4", "ZDOTDIR"),
        *("PROMPT_COMMAND", "SHELLOPTS", "PERL*", "RUBY*", "GEM_*", "NODE_*", "LUA_*", "JAVA_*", "_JAVA_*", "JDK_*"),
        *("CLASSPATH", "VIRTUAL_ENV", "CONDA_*", "PIP_*", "UV_*", "GIT_*", "SSH_*", "BROWSER", "EDITOR", "VISUAL"),
        *("PAGER", "MANPAGER", "LESSOPEN", "LESSCLOSE", "XDG_*", "*_EXECUTABLE", "*_COMMAND", "*_CMD"),
        *("COVERAGE_*", "PYDEVD*", "DEBUGPY*", "IPYTHON*", "JUPYTER*", "MPLBACKEND", "MPLCONFIGDIR", "MATPLOTLIBRC"),
        *("HF_MODULES_CACHE", "*TRUST_REMOTE_CODE", "*_CODE_EVAL", "TRANSFORMERS_TEST_*"),
        *("TORCH_HOME", "TORCH_HUB*", "TORCH_PYTHON_NATIVE_*", "SM_FRAMEWORK_*", "OTEL_*", "*NO_WEIGHTS_ONLY*"),
        *("WANDB__EXECUTABLE", "WANDB_DOCKER"),
    ),
    "decides which compiler or compiled code runs": (
        *("*_INCLUDE_PATH", "COMPILER_PATH", "CUDA_PATH", "ROCM_PATH", "CUDA_CACHE_PATH"),
        *("CC", "CXX", "CPP", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "*_COMPILER", "CUDACXX"),
        *("GCC_EXEC_PREFIX", "CUDA_HOME", "CUDA_ROOT", "ROCM_HOME", "NVCC_*", "ONEAPI_ROOT", "CUDNN_*", "HALIDE_*"),
        *("TRITON_*PATH*", "TRITON_*CACHE*", "TRITON_*DIR", "TRITON_*HOME", "TRITON_*OVERRIDE*", "TRITON_*BACKEND*"),
        *("TRITON_*HOST*", "TRITON_*REDIS*", "TRITON_*HOOK*", "TORCHINDUCTOR_*DIR", "TORCHINDUCTOR_*REDIS*"),
        *("TORCHINDUCTOR_CXX", "TORCHINDUCTOR_CPP_MARCH", "TORCH_EXTENSIONS_DIR", "PYTORCH_NVCC", "CMAKE_*"),
        *("LOCAL_KERNELS", "KERNELS_*", "USE_HUB_KERNELS", "NUMBA_CACHE_*", "QUACK_CACHE_*", "TILELANG_*"),
        *("CUDAHOSTCXX", "FLASHINFER_*", "CUPY_*", "CUTE_DSL_*", "DS_BUILD_*"),
    ),
    "decides where traffic and tokens go": (
        *("*_PROXY", "*_PROXIES", "SSL_*", "SSLKEYLOGFILE", "*_CA_BUNDLE", "*_CA_CERTS", "*_CA_CERT"),
        *("*_ENDPOINT", "*_ENDPOINTS", "*_ENDPOINT_*", "*_URL", "*_URLS", "*_URL_*", "*_URI", "*_HOST", "*_HOSTS"),
        *("*_ADDR", "*_ADDRESS", "*_SERVER", "*_GATEWAY", "*_CONNECTION_STRING", "NCCL_COMM_ID", "HUGGINGFACE_CO_*"),
        *("HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "RESOLV_HOST_CONF", "*_METADATA_*", "GCE_METADATA*"),
        *("FSSPEC_*", "*_UNIVERSE_DOMAIN", "HF_OIDC_*", "HF_DEVICE_CODE_*", "TRACKIO_S*", "CLEARML_CONFIG_*"),
        *("*_DSN", "COMET_CONFIG*", "WANDB_IDENTITY_*"),
    ),
    "decides whose credentials are used": (
        *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE", "AWS_WEB_IDENTITY_*", "AWS_CONTAINER_*"),
        *("AWS_ROLE_*", "BOTO_*", "GOOGLE_APPLICATION_*", "GOOGLE_AUTH_*"),
        *("CLOUDSDK_*", "AZURE_CONFIG_DIR", "AZURE_CLIENT_*", "AZURE_STORAGE_*", "KUBECONFIG", "DOCKER_CONFIG"),
        *("NETRC", "CURL_HOME", "HF_HOME", "HF_TOKEN_PATH", "WANDB_CONFIG_DIR"),
    ),
}


def why_refused(name: str) -> str:
    """Returns what the name decides, if a config may not set it without the flag; empty for any other name."""
    upper = name.upper()
    if upper in HARMLESS:
        return ""
    return next((why for why, patterns in REFUSED.items() if matches(upper, patterns)), "")


def env_faults(env: Any, allowed: Collection[str] = ()) -> Iterator[Fault]:
    """Yields what is wrong with a config's ``env``. ``allowed``: refused names that the user allowed."""
    if not isinstance(env, Mapping):
        yield Fault("env", f"{shown(env)} is not a mapping", "env: {NCCL_DEBUG: INFO}")
        return
    for name, value in env.items():
        key = f"env.{name}"
        if not isinstance(name, str) or not name.isidentifier():
            yield Fault(key, "is no name of the environment", "env: {NCCL_DEBUG: INFO}")
        elif is_own(name):
            yield Fault(key, "is for spotune to set", "leave it out")
        elif name not in allowed and (why := why_refused(name)):
            yield Fault(key, why, f"leave it out, or allow it: {FLAG} {name}")
        elif not isinstance(value, (str, int, float)) or (isinstance(value, str) and "\0" in value):
            yield Fault(key, f"{shown(value)} is not text", f'{name}: "1"')


def check_env(config: Mapping[str, Any], where: object, allowed: Collection[str]) -> None:
    """Raises InputError for a name that a record's config sets and nobody allowed on this machine."""
    refuse(where, env_faults(config.get("env") or {}, allowed))


def allowed_in(config: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Returns the names that the config's ``env`` sets because the user allowed them, sorted."""
    env = config.get("env")
    return sorted(name for name in set(allowed) if isinstance(env, Mapping) and name in env and why_refused(name))


def is_own(name: str) -> bool:
    """Returns whether spotune or SkyPilot sets the name: no flag lets a config do it."""
    return matches(name.upper(), OWN)


def matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def allowed_names(text: str) -> tuple[str, ...]:
    """Reads ``SPOTUNE_ALLOW_ENV``: names with blanks or commas between them."""
    return tuple(text.replace(",", " ").split())
