"""What counts as a secret: names and contents of files."""

import base64
import subprocess
from pathlib import Path

import pytest

from spotune.launch.secretfiles import secret_content, secret_name

ROOT = Path(__file__).parents[3]
SECRET_NAMES = """
secrets.yaml credentials.ini local.toml env.sh .envrc .env .env.local prod.env config/secrets.yml my-secret.json
db_password.txt hf_token.yaml token.txt api_key.toml service-account-prod.json id_rsa keys/server.pem tls.key .netrc
.npmrc .pypirc kubeconfig infra/terraform.tfstate terraform.tfvars secrets.py prod_credentials.py .aws/config
settings.local.yaml AwsCredentials.ini .ssh/config secrets/db.yaml
""".split()
PLAIN_NAMES = """
train.py keys.py tokenizer.py tokenizer.json special_tokens_map.json added_tokens.json token_classification.yaml
test_secrets.py secretfiles.py env.py environment.yaml config.yaml .env.example secrets.yaml.template id_rsa.pub
max_tokens.yaml localize.toml keyboard.ini monkey.sh local.py chat_template.jinja
""".split()
# In two parts each, so that nobody takes this file for one that holds secrets.
SECRETS = {
    "an AWS key": "AKIA" + "IOSFODNN7EXAMPLE",
    "an AWS secret key": "aws_secret_access" + "_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "a private key": "-----BEGIN RSA PRIVATE" + " KEY-----\n" + "MIIEpAIBAAKCAQEA" * 4,
    "a GitHub token": "gh" + "p_16C7e42F292c6912E7710c838347Ae178B4a",
    "a Hugging Face token": "hf" + "_QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi",
    "an API key": "sk-" + "proj-Zx8Qw3Er5Ty7Ui9Op1As2Df4Gh6Jk8Lz0",
    "a Slack token": "xoxb-" + "123456789012-abcdefABCDEF",
    "a Google key": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "a wandb key": "wandb_api" + "_key: 0123456789abcdef0123456789abcdef01234567",
    "a JWT": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "a password in a URL": "postgres://ada:" + "s3cretpw@db.internal/x",
    "a password": "pass" + 'word = "hunter2!x"',
    "a token or key": "tok" + 'en: "8f3kq0z7m2x9w4v1b6n5"',
}
PLAIN = (
    'token = os.environ["HF_TOKEN"]',
    'hf_token = "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"  # yours',
    "export HF_TOKEN=$(cat ~/.token)",
    "password: ${DB_PASSWORD}",
    "password: changeme",
    'password = "<your password here>"',
    "eos_token: <|im_end|>",
    "pad_token_id: 151643",
    "tokenizer_name: Qwen/Qwen3-0.6B-Instruct-2507",
    "secret_name: my-app-config-2024",
    "token = get_token_from_vault2(name)",
    "password = getpass.getpass()",
    "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "url: https://example.com:8443/a@b",
    'assert text.startswith("-----BEGIN PRIVATE" + " KEY-----")',
    "task-specific-learning-rates-and-more-words",
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name: str) -> None:
    assert secret_name(name)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_names_of_code_and_configs(name: str) -> None:
    assert not secret_name(name)


@pytest.mark.parametrize("what", SECRETS)
def test_contents_of_secrets_by_line(what: str) -> None:
    text = f"a: 1\n\nb: 2\n{SECRETS[what]}\nc: 3\n"
    assert secret_content(text.encode(), "a.yaml") == (4, what)
    assert secret_content(text.encode("utf-16"), "a.yaml") == (4, what)


@pytest.mark.parametrize("line", PLAIN)
@pytest.mark.parametrize("name", ["a.yaml", "a.py"])
def test_code_and_placeholders_are_no_secrets(line: str, name: str) -> None:
    assert secret_content(line.encode(), name) is None


def test_text_without_quotes_is_a_value_in_a_config_only() -> None:
    line = b"pass" + b"word = Tr0ub4dor"
    assert secret_content(line, "a.ini")
    assert secret_content(line, "a.py") is None


def test_this_repository_is_code() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    names = [name for name in listed.decode().split("\0") if name.startswith(("src/", "config/", "tasks/", "docs/"))]
    if not names:
        pytest.skip("no git checkout")
    assert [name for name in names if secret_name(name)] == []
    found = [(name, secret_content((ROOT / name).read_bytes(), name)) for name in names if (ROOT / name).is_file()]
    assert [one for one in found if one[1]] == []


def test_random_bytes_in_base64_are_no_secret_by_themselves() -> None:
    assert secret_content(base64.b64encode(bytes(range(256)) * 8), "a.json") is None
