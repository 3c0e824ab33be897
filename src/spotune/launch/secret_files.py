"""Finds files with secrets, by their name and by their content. Pure: takes paths and bytes.

A run's code goes to a shared bucket unencrypted, so that a file is left out even if it only looks like a secret.
Placeholders (``hf_xxxx``, ``changeme``, ``${TOKEN}``) and ordinary code do not count.
"""

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Iterator
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
        "a private key without its header": rb"\bMII[A-Za-z0-9+/]{3}IBAAK[A-Za-z0-9+/]{20}"  # PKCS 1
        rb"|\bMII[A-Za-z0-9+/]{3}IBADANBgkqhkiG9w0BAQEF|\bMI[GH][A-Za-z0-9+/]AgEAM[A-Za-z0-9+/]{2}GByqGSM49"  # PKCS 8
        rb"|\bMHcCAQEE[A-Za-z0-9+/]{20}|\bMC4CAQAwBQYDK2V[A-Za-z0-9+/]{20}|\bb3BlbnNzaC1rZXktdjE[A-Za-z0-9+/]{20}"
        rb"|LS0tLS1CRUdJTiB(?:QUklWQVRF|SU0EgUFJJV|FQyBQUklWQ|PUEVOU1NI|FTkNSWVBURU|EU0EgUFJJV)",  # of a whole PEM
        "an age key": rb"\bAGE-SECRET-KEY-1[A-Z0-9]{30,}",
        "a PuTTY key": rb"PuTTY-User-Key-File-\d: [\s\S]{0,3000}?Private-Lines:\s*\d+\s+[A-Za-z0-9+/=]{16}",
        "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
        "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
        "a Hugging Face token": rb"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}",
        "an API key": rb"\bsk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_-]{0,80}[A-Za-z0-9_]{20,}",
        "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"
        rb"|hooks\.slack\.com/(?:services|workflows|triggers)/\w+/\w+/\w+",
        "a webhook": rb"(?i)discord(?:app)?\.com/api/(?:v\d+/)?webhooks/\d{10,25}/[\w-]{30,}"
        rb"|\.webhook\.office\.com/webhookb2/[\w@/-]{40,}",
        "a Telegram token": rb"(?:\bbot|\b)\d{8,10}:A[A-Za-z0-9_-]{34}(?![A-Za-z0-9_-])",
        "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}|\bGOCSPX-[A-Za-z0-9_-]{20,}|\bya29\.[A-Za-z0-9_-]{20,}",
        "a wandb key": rb"(?i)\bwandb_v1_[a-z0-9_]{20,}"
        rb"|wandb.{0,30}?(?:key|login)[\"']?[\s=:,(]{1,5}[\"']?[0-9a-f]{40}\b",
        "a JWT": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        "a payment key": rb"\b[sr]k_live_[A-Za-z0-9]{16,}",
        "a registry token": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[A-Za-z0-9_-]{40,}|\bdckr_pat_[A-Za-z0-9_-]{20,}",
        "a service's key": rb"\bdapi[0-9a-f]{32}\b|\bdop_v1_[0-9a-f]{64}|\bSG\.[\w-]{20,24}\.[\w-]{40,45}"
        rb"|\bgsk_[A-Za-z0-9]{40,}|\bnvapi-[\w-]{40,}|\br8_[A-Za-z0-9]{37}|AccountKey=[A-Za-z0-9+/=]{60,}"
        rb"|[?&;]sig=[A-Za-z0-9%+/]{30,}",
    }.items()
)
_URL = re.compile(rb"://[^\s/:@'\"<>{}$]{0,100}:([^\s/@'\"<>{}$]{3,200})@[\w.-]")
# For speed a name is searched in lower case, and its value is matched only where the name ends.
_NAME = re.compile(
    rb"(?:(?:api|access|secret|private|auth|encryption|signing|master|license|account|client|deploy|storage|openai|anthropic"
    rb"|wandb|hf)[_-]?key|passw(?:or)?d|passphrase|pwd|secret|token|credentials?)(?:_?(?:value|base64|b64|\d))?"
)
_SHORT = re.compile(rb"(?<![a-z0-9])(?:pass|pw|psw|key)(?![a-z0-9_-])")
_BEFORE = re.compile(rb"[A-Za-z0-9_-]*\Z")
_ASSIGNED = re.compile(
    rb"[\"']?\s{0,20}(?::\s{0,5}[A-Za-z_][\w.\[\]|]{0,30}(?: \| \w{1,20})?\s{0,5}=|=>|:=|[:=])\s{0,20}(?:\(\s{0,40})?"
    rb"[rbfuRBFU]{0,2}(?:\"([^\"\n]{6,200})\"|'([^'\n]{6,200})'|([^\"'\s,;#]{6,200})(?=[\s,;#]|$))"
)
_BESIDE_IT = (
    re.compile(rb"[\"']\s{0,5},[^\"'\n()]{0,60}[\"']([^\"'\s]{6,200})[\"']"),  # getenv("TOKEN", "…")
    re.compile(rb"[\"']?,?\s{1,40}[\"']?value[\"']?\s{0,5}:\s{0,5}[\"']?([^\"'\s,{}]{6,200})"),  # name: TOKEN, value: …
)
_IN_TEXT = re.compile(
    rb"[\"'](?:[^\"'\n]{0,200}[\s;&?])?(?i:password|passwd|pwd|pass)=([^\s\"',;()]{6,200})(?=[\s\"';])"  # of a DSN
)
_NO_PASSWORD = re.compile(
    rb"(?i)(?:^|[_-])(?:forward|backward|first|second|third|last|one|two|single|multi|num|by|fwd|bwd)[_-]"
)
_NO_KEY = re.compile(rb"(?:^|_)(?:PUBLIC|PUB|CACHE|PRIMARY|PARTITION|SORT|FOREIGN|ROUTING|IDEMPOTENCY|HOST|SITE)_")
_HEADER = re.compile(
    rb"(?i)\bbearer[\s:]{1,3}[\"']?([\w.~+/=-]{16,400})"
    rb"|\bauthorization[\"']?\s{0,5}[:=,]\s{0,5}[\"']?(?:token|api-?key)\s{1,3}([\w.~+/=-]{16,400})"
)
_BASIC = re.compile(rb"(?i)\bauthorization[\"']?\s{0,5}[:=,]\s{0,5}[\"']?basic\s{1,3}([a-z0-9+/]{6,400}={0,2})")
_COMMAND = re.compile(
    rb"\bcurl\b[^\n]{0,300}?\s(?:-u|--user)[\s=]{0,3}[\"']?[^\s:\"'$<{`]{1,100}:([^\s\"'$<{`,;]{2,100})"
    rb"|\bsshpass\s{1,3}-p[\s=]{0,3}[\"']?([^\s\"'$<{`,;]{2,100})"
)
_OPTION = re.compile(rb"(?:^|\s)--(?:[a-z]{1,20}-)?\Z")
_FLAG = re.compile(rb"\s{1,3}[\"']?([^\s\"']{6,200})")  # after --password
_SENTENCE = re.compile(
    rb"(?i)\b(?:passw\w*|passphrase|please|enter|type|your|the|an?|must|is|are|not|no|invalid|missing|wrong|required|to|of|for"
    rb"|in|if|user|with|secrets?|tokens?|and|or|that|this|from)\b|[.:?]$"
)
_PASSWORD = re.compile(rb"(?i)passw|passphrase|pwd")
_PLACEHOLDER = re.compile(
    rb"(?i)^(?:[x*.0#-]+|<.*>|\[.*\]|\$.*|\{.*\}|%.*|(?:your|fake|dummy).*|(?:my|the|a|some|insert|enter|put)[-_].*"
    rb"|.*(?:change-?_?me|placeholder|redacted|xxxx|\*\*\*|hidden|\.\.\.).*|none|null|true|false|undefined|required"
    rb"|optional|string|password\d?|passwd|pass|secret|token|example.*|default|env)$"
)
_WORDS_ONLY = re.compile(rb"^[A-Za-z]+(?:[-_./:][A-Za-z]+|[-_./:]\d+)*$")


def secret_name(path: str) -> bool:
    """Returns whether a file of that name usually holds secrets. ``path``: relative, with slashes."""
    pure = PurePosixPath(path)
    name = pure.name.lower()
    if any(fnmatchcase(name, pattern) for pattern in _NOT_SECRET):
        return False
    is_code = pure.suffix.lower() in _CODE
    if any(part.lower() in _FOLDERS for part in pure.parts[:-1]) and not is_code:
        return True
    if any(fnmatchcase(name, pattern) for pattern in _NAMES) and not is_code:
        return True
    stem = pure.name.partition(".")[0] or pure.name.lstrip(".").partition(".")[0]
    words = [word.lower() for word in re.findall(r"[A-Za-z][a-z]*|[A-Z]+(?![a-z])", stem)]
    pairs = set(pairwise(words))
    has_pair = any((one, two) in pairs or (one, two + "s") in pairs for one, two in _PAIRS)
    if is_code:  # secrets.py, prod_credentials.py, api_keys.py; not test_secret_rotation.py, keys.py
        return (bool(_STRONG & set(words)) or has_pair) and set(words) <= _STRONG | _BESIDE
    return bool(_STRONG & set(words)) or has_pair or bool(words and words[-1] in _WEAK)


def secret_content(data: bytes, path: str = "") -> tuple[int, str] | None:
    """Returns the line (from 1) and the kind of the first secret in a file, or None.

    The suffix of ``path`` decides whether a text without quotes is a value.
    """
    data = data[:MAX_SCAN_BYTES].replace(b"\0", b"")  # UTF-16 as well
    data = data.replace(b'\\"', b' "')  # code as JSON has it in a notebook
    found = []
    for what, pattern in _TOKENS:  # not ``hf_xxxxxxxx`` and the like: a prefix and one repeated character
        matches = (match for match in pattern.finditer(data) if not set(match[0][-16:]) <= set(b"xX*.0-_"))
        found += [(match.start(), what) for match in matches]
    found += [(match.start(), "a password in a URL") for match in _URL.finditer(data) if _is_password(match[1])]
    found += _assigned(data, PurePosixPath(path).suffix.lower() in _CODE)
    found += _sent(data)
    if not found:
        return None
    start, what = min(found)
    return data.count(b"\n", 0, start) + 1, what


def _assigned(data: bytes, is_code: bool) -> Iterator[tuple[int, str]]:
    """Yields values that a name beside them calls a secret. ``is_code``: only text in quotes is a value."""
    lower = data.lower()
    for name in _NAME.finditer(lower):
        is_password = bool(_PASSWORD.search(name[0]))
        if match := _ASSIGNED.match(data, name.end()):
            value = _value(match, is_code)
            if not is_password and is_random(value):
                yield name.start(), "a token or key"
            elif is_password and _is_password(value) and not (is_code and _WORDS_ONLY.match(value)):
                yield name.start(), "a password"
        for pattern in (*_BESIDE_IT, _FLAG):
            match = pattern.match(data, name.end())
            if match and (pattern is not _FLAG or _OPTION.search(data, max(0, name.start() - 30), name.start())):
                if is_random(match[1]):
                    yield name.start(), "a token or key"
                elif is_password and _is_mixed(match[1]):
                    yield name.start(), "a password"
    for name in _SHORT.finditer(lower):
        if not (match := _ASSIGNED.match(data, name.end())):
            continue
        value, before = _value(match, is_code), _BEFORE.search(data, max(0, name.start() - 60), name.start())
        prefix = before[0] if before else b""
        if name[0] != b"key":
            if _is_mixed(value) and not _NO_PASSWORD.search(prefix):
                yield name.start(), "a password"
        elif prefix and data[name.start() : name.end()] == b"KEY" and is_random(value) and not _NO_KEY.search(prefix):
            yield name.start(), "a token or key"
    for match in _IN_TEXT.finditer(data):
        if _is_mixed(match[1]):
            yield match.start(), "a password"


def _value(match: re.Match[bytes], is_code: bool) -> bytes:
    return (match[1] or match[2] or (b"" if is_code else match[3]) or b"").strip()


def _sent(data: bytes) -> Iterator[tuple[int, str]]:
    """Yields the credentials that a request or a command sends."""
    for match in _HEADER.finditer(data):
        if is_random(match[1] or match[2]):
            yield match.start(), "a token or key"
    for match in _BASIC.finditer(data):
        try:
            signed = base64.b64decode(match[1] + b"==")
        except binascii.Error:
            continue
        if b":" in signed[1:-1] and signed.isascii():
            yield match.start(), "a password"
    for match in _COMMAND.finditer(data):
        if not _PLACEHOLDER.match(match[1] or match[2]):
            yield match.start(), "a password"


def is_random(value: bytes) -> bool:
    """Returns whether a value looks random: long, with letters and digits mixed, and many different characters."""
    is_plain = _PLACEHOLDER.match(value) or _WORDS_ONLY.match(value) or re.search(rb"[()\[\]{}<>|\\$\s]", value)
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
    if re.search(rb"\s", value) and (_SENTENCE.search(value.strip()) or not re.match(rb"^\S+(?: \S+){1,7}$", value)):
        return False
    return not (value.startswith(b"$") or (value.isdigit() and len(set(value)) == 1))


def _is_mixed(value: bytes) -> bool:
    """Returns whether a value looks like a password by itself: letters, and digits or signs."""
    has_letters = re.search(rb"[A-Za-z]", value) and re.search(rb"[0-9!@#%^&*?~+]", value)
    return bool(has_letters) and not re.search(rb"\s", value) and not _WORDS_ONLY.match(value) and _is_password(value)
