"""Which names a config's ``env:`` may set."""

from pathlib import Path

import pytest

from spotune.contracts.config import load_config
from spotune.contracts.envrule import HARMLESS, allowed_in, env_faults, why_refused
from spotune.contracts.errors import InputError

REFUSED = """
LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES GLIBC_TUNABLES GCONV_PATH NCCL_NET_PLUGIN OPENSSL_CONF
PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONUSERBASE PYTHONBREAKPOINT PATH HOME SHELL BASH_ENV ENV IFS
PERL5LIB PERL5OPT NODE_OPTIONS RUBYOPT JAVA_TOOL_OPTIONS GIT_SSH_COMMAND GIT_CONFIG_COUNT PIP_INDEX_URL UV_INDEX_URL
VIRTUAL_ENV CC CXX CUDA_HOME TRITON_PTXAS_PATH TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR HF_MODULES_CACHE
HTTPS_PROXY https_proxy ALL_PROXY no_proxy SSL_CERT_FILE SSLKEYLOGFILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE AWS_CA_BUNDLE
HF_ENDPOINT AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 WANDB_BASE_URL STORAGE_EMULATOR_HOST GCE_METADATA_HOST
AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE GOOGLE_APPLICATION_CREDENTIALS KUBECONFIG HF_TOKEN_PATH
""".split()
FREE = """
NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING OMP_NUM_THREADS
TOKENIZERS_PARALLELISM WANDB_PROJECT WANDB_ENTITY WANDB_MODE HF_HUB_OFFLINE HF_HUB_CACHE HF_DATASETS_CACHE HF_HOME
HF_HUB_ENABLE_HF_TRANSFER TRANSFORMERS_VERBOSITY TENSORBOARD_LOGGING_DIR PYTORCH_CUDA_ALLOC_CONF TORCH_DISTRIBUTED_DEBUG
PYTHONHASHSEED PYTHONUNBUFFERED TMPDIR TZ LANG LC_ALL AWS_DEFAULT_REGION MKL_NUM_THREADS ACCELERATE_USE_CPU MY_PATH
""".split()


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_decides_what_runs_needs_the_flag(name: str) -> None:
    (fault,) = env_faults({name: "x"})
    assert (fault.key, fault.remedy) == (f"env.{name}", f"leave it out, or allow it: --allow-env {name}")
    assert list(env_faults({name: "x"}, [name])) == []


@pytest.mark.parametrize("name", FREE)
def test_other_names_are_free(name: str) -> None:
    assert list(env_faults({name: "x"})) == []


@pytest.mark.parametrize("name", ["SPOTUNE_BUCKET", "SPOTUNE_ALLOW_ENV", "SKYPILOT_TASK_ID", "spotune_x"])
def test_no_flag_lets_a_config_set_our_own_names(name: str) -> None:
    (fault,) = env_faults({name: "x"}, [name])
    assert fault.what == "is for spotune to set"


def test_harmless_names_of_python_name_no_file() -> None:
    assert not any(map(why_refused, HARMLESS))


def test_only_names_that_need_it_are_recorded_as_allowed() -> None:
    config = {"env": {"LD_PRELOAD": "a.so", "NCCL_DEBUG": "INFO"}}
    assert allowed_in(config, ["LD_PRELOAD", "NCCL_DEBUG", "PATH"]) == ["LD_PRELOAD"]
    assert allowed_in({"env": ["LD_PRELOAD"]}, ["LD_PRELOAD"]) == []


def test_a_config_is_refused_with_its_file_key_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: a/b\ndata: [{source: x}]\nenv: {LD_PRELOAD: a.so, NCCL_DEBUG: INFO}\n")
    says = f"{path}: env.LD_PRELOAD: decides what the loader loads (leave it out, or allow it: --allow-env LD_PRELOAD)"
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value) == says
    assert load_config(path, allowed_env=["LD_PRELOAD"])["env"]["LD_PRELOAD"] == "a.so"
