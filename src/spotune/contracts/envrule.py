"""Which names a config's ``env:`` may set. The launcher and the guard apply the same rule.

A config is often somebody else's file, and a record in the bucket somebody else's writing. A name that decides which
code runs, or where a token is sent, is refused unless the user allows it by name with ``--allow-env``.
"""

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from spotune.contracts.configvalues import Fault
from spotune.contracts.errors import refuse, shown

FLAG = "--allow-env"
OWN = ("SPOTUNE_*", "SKYPILOT_*")  # never, with no flag

# Python reads these, and none of them names a file, a folder or a module.
HARMLESS = frozenset(
    "PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONHASHSEED PYTHONIOENCODING PYTHONNOUSERSITE PYTHONSAFEPATH"
    " PYTHONTRACEMALLOC PYTHONUNBUFFERED PYTHONUTF8".split()
)
# reason -> patterns of names, upper case.
REFUSED: dict[str, tuple[str, ...]] = {
    "decides what the loader loads": (
        *("LD_*", "DYLD_*", "GLIBC_TUNABLES", "GCONV_PATH", "GETCONF_DIR", "LOCPATH", "NLSPATH", "MALLOC_TRACE"),
        *(
            "*_PRELOAD",
            "*_INJECTION*_PATH",
            "OMP_TOOL*",
            "NCCL_*PLUGIN*",
            "NCCL_CONF_FILE",
            "OPENSSL_*",
            "HSA_TOOLS_LIB",
        ),
        *("LIBRARY_PATH", "LIBPATH", "SHLIB_PATH", "OCL_ICD_*", "VK_*", "SASL_PATH", "KRB5_*", "HSA_TOOLS_LIB"),
    ),
    "decides which programs and modules run": (
        *("PYTHON*", "PATH", "HOME", "USER", "LOGNAME", "SHELL", "BASH*", "ENV", "IFS", "CDPATH", "PS4", "ZDOTDIR"),
        *("PROMPT_COMMAND", "SHELLOPTS", "PERL*", "RUBY*", "GEM_*", "NODE_*", "LUA_*", "JAVA_*", "_JAVA_*", "JDK_*"),
        *("CLASSPATH", "VIRTUAL_ENV", "CONDA_*", "PIP_*", "UV_*", "GIT_*", "SSH_*", "BROWSER", "EDITOR", "VISUAL"),
        *("PAGER", "MANPAGER", "LESSOPEN", "LESSCLOSE", "XDG_*", "HF_MODULES_CACHE", "WANDB__EXECUTABLE"),
    ),
    "decides which compiler or compiled code runs": (
        *("CC", "CXX", "CPP", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "*_INCLUDE_PATH", "COMPILER_PATH"),
        *("GCC_EXEC_PREFIX", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "ROCM_HOME", "ROCM_PATH", "NVCC_*", "TRITON_*PATH"),
        *("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH"),
        *("PYTORCH_NVCC", "TORCHINDUCTOR_CXX", "CMAKE_*"),
    ),
    "decides where traffic and tokens go": (
        *("*_PROXY", "SSL_*", "SSLKEYLOGFILE", "*_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "*_CA_CERTS", "*_CA_CERT"),
        *("*_ENDPOINT", "*_ENDPOINT_URL", "*_ENDPOINT_URL_*", "*_BASE_URL", "*_TRACKING_URI", "*_EMULATOR_HOST"),
        *("HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "RESOLV_HOST_CONF", "NIS_PATH", "*_METADATA_*", "GCE_METADATA*"),
    ),
    "decides whose credentials are used": (
        *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE", "AWS_WEB_IDENTITY_*", "AWS_CONTAINER_*"),
        *("AWS_ROLE_*", "BOTO_*", "GOOGLE_APPLICATION_*", "GOOGLE_AUTH_*", "CLOUDSDK_*", "AZURE_CONFIG_DIR"),
        *("KUBECONFIG", "DOCKER_CONFIG", "DOCKER_HOST", "NETRC", "CURL_HOME", "HF_TOKEN_PATH", "WANDB_CONFIG_DIR"),
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
