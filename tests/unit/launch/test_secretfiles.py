"""What counts as a secret: names and contents of files."""

import base64
import subprocess
from pathlib import Path

import pytest

from spotune.launch.secret_files import secret_content, secret_name

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
# The same: what is left of the bar and what is right of it make one text. Name -> the file, the text.
HIDDEN = {
    "an annotated name": ("a.py", 'TOK|EN: str = "8f3kq0z7m2x9w4v1b6n5"'),
    "a secret key": ("a.py", 'secret_k|ey = "8f3kq0z7m2x9w4v1b6n5"'),
    "brackets and a new line": ("a.py", 'tok|en = (\n    "8f3kq0z7m2x9w4v1b6n5"\n)'),
    "a default of getenv": ("a.py", 'os.getenv("TO|KEN", "8f3kq0z7m2x9w4v1b6n5")'),
    "a default of environ.get": ("a.py", 'os.environ.get("DB_PASS|WORD", "hunter2!x")'),
    "a default of an option": ("a.py", 'parser.add_argument("--tok|en", type=str, default="8f3kq0z7m2x9w4v1b6n5")'),
    "a notebook": ("a.ipynb", '"api_k|ey = \\"8f3kq0z7m2x9w4v1b6n5\\"\\n"'),
    "a bearer": ("a.py", '{"Authorization": "Bea|rer fedcba9876543210fedcba9876543210"}'),
    "basic authorization": ("a.sh", 'curl -H "Authorization: Ba|sic YWRtaW46aHVudGVyMg==" x'),
    "curl": ("a.sh", "cu|rl -u admin:hunter2 https://x"),
    "sshpass": ("a.sh", "ssh|pass -p hunter2 ssh x"),
    "words in quotes": ("a.yaml", 'pass|word: "correct horse battery"'),
    "a prefix and pass": ("a.yaml", "db_pa|ss: hunter2x"),
    "pass alone": ("a.sh", "PA|SS=hunter2x"),
    "pw alone": ("a.py", "p|w = 'hunter2x'"),
    "a DSN in code": ("a.py", "connect('host=db user=ada pass|word=Tr0ub4dor&3 dbname=x')"),
    "a key that is exported": ("a.sh", "export MY_K|EY=fedcba9876543210fedcba9876543210"),
    "Discord": (
        "a.py",
        (
            '"https://discord.com/api/web|hooks/123456789012345678/aB3dE6gH9-aB3dE6'
            'gH9-aB3dE6gH9-aB3dE6gH9-aB3dE6gH9-aB3dE6gH9-aB3dE6gH9-"'
        ),
    ),
    "Slack": ("a.py", '"https://hooks.slack.com/ser|vices/T01ABCDEF/B01ABCDEF/a1B2c3D4e5F6g7H8i9J0k1L2"'),
    "Telegram": ("a.py", '"https://api.telegram.org/bot123456789:A|E5fKq0z7m2x9w4v1b6n5pQrStUvWxYz0-_"'),
    "a signed URL": (
        "a.py",
        ('"https://x.blob.core.windows.net/c?sv=2024&si|g=aB3dE6gH9kL2mN5pQ8sT1vW4yZ7bC0eF%2B3hJ6k%3D"'),
    ),
    "age": ("a.txt", "AGE-SECRET-K|EY-1QYQSZQGPQYQSZQGPQYQSZQGPQYQSZQGPQYQSZQGPQYQSZQGPQYQSZQ"),
    "PuTTY": (
        "a.txt",
        (
            "PuTTY-User-K|ey-File-3: ssh-ed25519\nEncryption: none\nComment: x\nPublic"
            "-Lines: 2\nAAAA\nBBBB\nPrivate-Lines: 1\nAAAAIEx1Zm9yZ2V0bWVub3RhbmQ=\n"
        ),
    ),
    "PKCS 1": ("a.py", 'x = "MII|EpAIBAAKCAQEAx8Qw3Er5Ty7Ui9Op1As2Df4Gh6Jk8Lz0"'),
    "PKCS 8": ("a.py", 'x = "MII|EvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEA"'),
    "PKCS 8 of a curve": ("a.py", 'x = "MI|GHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg"'),
    "OpenSSH": ("a.py", 'x = "b3BlbnNzaC|1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAA"'),
    "a PEM in base64": ("a.yaml", "x: LS0tLS1CRUdJ|TiBSU0EgUFJJVkFURSBLRVktLS0tLQpNSUlFcEFJQkFB"),
    "Kubernetes": ("a.yaml", "- name: DB_PASS|WORD\n  value: hunter2x"),
    "an option of a command": ("a.sh", "login --pass|word hunter2x"),
}
LOOK_ALIKES = (
    "key=lambda row: row.password_1",
    "max_new_tokens: 512",
    "tokenizer: Qwen/Qwen3-0.6B",
    'pad_token: "<pad>"',
    "password: null",
    'os.getenv("TOKEN")',
    'os.environ.get("TOKEN", "")',
    'os.getenv("HF_TOKEN", "changeme")',
    'eos_token: "<|endoftext|>"',
    "bos_token_id: 151643",
    '  "@oxc/core@1.2.3": sha256-9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08',
    'cache_key = "9f86d081884c7d659a2feaa0c55ad015"',
    "curl -u user:pass https://x",
    "`curl -u` and `sshpass -p`, with a password",
    "CACHE_KEY=9f86d081884c7d659a2feaa0c55ad015",
    "key: 9f86d081884c7d659a2feaa0c55ad015",
    "key: value",
    'forward_pass = "step_2!"',
    "bypass: run-2!x",
    'compass = "n0rth!east"',
    'assert (passed, failed) == (3, 0), "pass: 12/15"',
    'password = prompt("password: ")',
    '"password": "The password of the user"',
    'password: "Please enter it"',
    '"description": "your password = the one that you chose at first"',
    'def login(user: str, password: str = "") -> None:',
    "def login(user: str, token: Token | None = None) -> None:",
    'headers = {"Authorization": f"Bearer {token}"}',
    "Authorization: Bearer $TOKEN",
    "Authorization: Basic ${AUTH}",
    "# Authorization: Basic authentication is not taken",
    'curl -u "$USER:$PASSWORD" https://x',
    "docker run -u 1000:1000 image1",
    "spotune train run.yaml --secret HF_TOKEN --secret WANDB_API_KEY",
    'sshpass -p "$PASSWORD" ssh x',
    "sshpass -e ssh x",
    '("token", "tokens", "tokenizer_class")',
    '["password", "username", "email"]',
    'parser.add_argument("--token", help="of the hub")',
    "- name: HF_TOKEN",
    "SORT_KEY=created_at_2024_first",
    "lora_target_modules: [q_proj, k_proj]",
    "learning_rate: 2e-5",
    'chat_template: "{{ bos_token }}"',
    "if self.token_1 == other.token_1: pass",
    'x = "MIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQsw"',
    "x: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSURkekNDQWwr",
    "x: LS0tLS1CRUdJTiBQVUJMSUMgS0VZLS0tLS0KTUlJQklqQU5CZ2tx",
    "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "docs/pass.md?sig=true",
    "at 12345678:A time",
)
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


@pytest.mark.parametrize("kind", HIDDEN)
def test_secrets_as_code_and_commands_have_them(kind: str) -> None:
    name, text = HIDDEN[kind]
    assert secret_content(text.replace("|", "", 1).encode(), name)


@pytest.mark.parametrize("line", LOOK_ALIKES)
@pytest.mark.parametrize("name", ["a.yaml", "a.py"])
def test_look_alikes_are_no_secrets(line: str, name: str) -> None:
    assert secret_content(line.encode(), name) is None


def test_a_variable_that_a_call_gets_is_no_password() -> None:
    assert secret_content(b'f("a", password=passw0rd1, name="x")', "a.py") is None


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
