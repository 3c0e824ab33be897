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
