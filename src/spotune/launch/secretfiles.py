"""Tells which files hold secrets: by their name, and by what is in them. Pure: takes paths and bytes.

A shared bucket gets the code of a run in clear. What looks like a secret stays here, so a doubt decides against the
file; placeholders (``hf_xxxx``, ``changeme``, ``${TOKEN}``) and ordinary code do not count.
"""

import math
import re
from collections import Counter
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath

MAX_SCAN_BYTES = 10 << 20  # of one file

_NAMES = (
    ".env .env.* *.env .envrc* env.sh *env.local.sh setenv*.sh *.local *.local.* local.* local_settings.*"
    " settings_local.* .netrc _netrc .npmrc .pypirc .pgpass .my.cnf .htpasswd .git-credentials .dockercfg .s3cfg .boto"
    " .databrickscfg rclone.conf kubeconfig* *.kubeconfig *.tfstate *.tfstate.* *.tfvars* *.pem *.key *.p12"
    " *.pfx *.jks *.ppk *.keystore *.kdbx *.gpg *.asc id_[rd]sa* id_ecdsa* id_ed25519* .vault* vault.y*ml .*_history"
    " *.secret tokens.*".split()
)
_FOLDERS = frozenset(".aws .azure .docker .gcloud .gnupg .kube .ssh secrets .secrets credentials".split())
_NOT_SECRET = ("*.example", "*.sample", "*.template", "*.tmpl", "*.dist", "*example.*", "*.pub", "*sample.*")
_CODE = frozenset(".py .pyi .c .cc .cpp .cu .h .rs .go .js .ts .java".split())
_STRONG = frozenset("secret secrets credential credentials cred creds password passwords passwd passphrase".split())
_WEAK = frozenset("token apikey apikeys".split())  # only as a name's last word: token_classification.yaml is a config
_PAIRS = (("api", "key"), ("private", "key"), ("access", "key"), ("service", "account"), ("auth", "key"))
_BESIDE = frozenset("my our local prod production dev staging private api key keys aws gcp hf wandb app db".split())

_TOKENS = tuple(
    (what, re.compile(pattern))
    for what, pattern in {
        "an AWS key": rb"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",
        "an AWS secret key": rb"(?i)aws_?(?:secret_?)(?:access_?)?key[\"']?\s{0,5}[=:]\s{0,5}[\"']?[A-Za-z0-9/+=]{40}",
        "a private key": rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,400}?[A-Za-z0-9+/=]{16}",
        "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
        "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
        "a Hugging Face token": rb"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}",
        "an API key": rb"\bsk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_-]{0,80}[A-Za-z0-9_]{20,}",
        "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"
        rb"|hooks\.slack\.com/services/T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]+",
        "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}|\bGOCSPX-[A-Za-z0-9_-]{20,}|\bya29\.[A-Za-z0-9_-]{20,}",
        "a wandb key": rb"(?i)\bwandb_v1_[a-z0-9_]{20,}"
        rb"|wandb.{0,30}?(?:key|login)[\"']?[\s=:,(]{1,5}[\"']?[0-9a-f]{40}\b",
        "a JWT": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        "a payment key": rb"\b[sr]k_live_[A-Za-z0-9]{16,}",
        "a registry token": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[A-Za-z0-9_-]{40,}|\bdckr_pat_[A-Za-z0-9_-]{20,}",
        "a service's key": rb"\bdapi[0-9a-f]{32}\b|\bdop_v1_[0-9a-f]{64}|\bSG\.[\w-]{20,24}\.[\w-]{40,45}"
        rb"|\bgsk_[A-Za-z0-9]{40,}|\bnvapi-[\w-]{40,}|\br8_[A-Za-z0-9]{37}|AccountKey=[A-Za-z0-9+/=]{60,}",
    }.items()
)
_URL = re.compile(rb"://[^\s/:@'\"<>{}$]{0,100}:([^\s/@'\"<>{}$]{3,200})@[\w.-]")
_ASSIGNED = re.compile(
    rb"(?i)(passw(?:or)?d|passphrase|pwd|secret|token|api_?key|access_?key|secret_?key|private_?key|auth_?key|credentials?)"
    rb"(?:_?(?:value|base64|b64))?[\"']?\s{0,20}(?:=>|[:=])\s{0,20}(?:r|b|f)?"
    rb"(?:\"([^\"\s]{6,200})\"|'([^'\s]{6,200})'|([^\"'\s,;#]{6,200})(?=[\s,;#]|$))"
)
_PASSWORD = re.compile(rb"(?i)passw|passphrase|pwd")
_PLACEHOLDER = re.compile(
    rb"(?i)^(?:[x*.0#-]+|<.*>|\[.*\]|\$.*|\{.*\}|%.*|(?:your|fake|dummy).*|(?:my|the|a|some|insert|enter|put)[-_].*"
    rb"|.*(?:change-?_?me|placeholder|redacted|xxxx|\*\*\*|hidden|\.\.\.).*|none|null|true|false|undefined|required"
    rb"|optional|string|password\d?|passwd|secret|token|example.*|default|env)$"
)
_WORDS_ONLY = re.compile(rb"^[A-Za-z]+(?:[-_./:][A-Za-z]+|[-_./:]\d+)*$")


def secret_name(path: str) -> bool:
    """Returns whether a file of that name holds secrets as a rule. ``path``: relative, with slashes."""
    pure = PurePosixPath(path)
    name = pure.name.lower()
    if any(fnmatchcase(name, pattern) for pattern in _NOT_SECRET):
        return False
    is_code = pure.suffix.lower() in _CODE
    if any(part.lower() in _FOLDERS for part in pure.parts[:-1]) and not is_code:
        return True
    if any(fnmatchcase(name, pattern) for pattern in _NAMES) and not is_code:
        return True
    words = _words(pure.name.partition(".")[0] or pure.name.lstrip(".").partition(".")[0])
    pairs = set(pairwise(words))
    has_pair = any((one, two) in pairs or (one, two + "s") in pairs for one, two in _PAIRS)
    if is_code:  # secrets.py, prod_credentials.py, api_keys.py; not test_secret_rotation.py, keys.py
        return (bool(_STRONG & set(words)) or has_pair) and set(words) <= _STRONG | _BESIDE
    return bool(_STRONG & set(words)) or has_pair or bool(words and words[-1] in _WEAK)


def secret_content(data: bytes, path: str = "") -> tuple[int, str] | None:
    """Returns the line (from 1) and what it looks like, for the first secret in a file; None where there is none.

    ``path``: whose suffix says whether a text without quotes is a value.
    """
    data = data[:MAX_SCAN_BYTES].replace(b"\0", b"")  # UTF-16 as well
    found = []
    for what, pattern in _TOKENS:
        found += [(match.start(), what) for match in pattern.finditer(data) if _is_real(match[0])]
    found += [(match.start(), "a password in a URL") for match in _URL.finditer(data) if _is_password(match[1])]
    is_code = PurePosixPath(path).suffix.lower() in _CODE
    for match in _ASSIGNED.finditer(data):
        value = match[2] or match[3] or (b"" if is_code else match[4]) or b""
        if _PASSWORD.search(match[1]):
            if _is_password(value) and not (is_code and _WORDS_ONLY.match(value)):
                found.append((match.start(), "a password"))
        elif is_random(value):
            found.append((match.start(), "a token or key"))
    if not found:
        return None
    start, what = min(found)
    return data.count(b"\n", 0, start) + 1, what


def is_random(value: bytes) -> bool:
    """Returns whether a value looks drawn by chance: long, letters and digits mixed, many different characters."""
    is_plain = _PLACEHOLDER.match(value) or _WORDS_ONLY.match(value) or re.search(rb"[()\[\]{}<>|\\$]", value)
    if len(value) < 16 or is_plain:
        return False
    if not re.search(rb"\d", value) or not re.search(rb"[A-Za-z]", value):
        return False
    counts = Counter(value)
    bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return bits >= 3.0


def _is_password(value: bytes) -> bool:
    if len(value) < 6 or _PLACEHOLDER.match(value) or re.search(rb"[()\[\]{}<>|\\]", value):
        return False
    return not (value.startswith(b"$") or (value.isdigit() and len(set(value)) == 1))


def _is_real(token: bytes) -> bool:
    """Returns False for ``hf_xxxxxxxx`` and its like: after the prefix one character again and again."""
    tail = token[-16:]
    return not set(tail) <= set(b"xX*.0-_")


def _words(stem: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Za-z][a-z]*|[A-Z]+(?![a-z])", stem)]
