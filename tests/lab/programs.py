"""Stand-ins for what a node of SkyPilot downloads: uv's installer, and the Python that uv would fetch."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from tests.lab.layout import LabError, Layout
from tests.lab.machine import may_run

PYTHONS = "/usr/bin/python3.10 /usr/bin/python3.11 /usr/local/bin/python3.11 /usr/bin/python3".split()

# SkyPilot asks uv for Python 3.10, which uv would download. Jobs have none of the caller's settings for uv.
UV = """\
#!/bin/bash
export UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1
{settings}
words=()
for word in "$@"; do
  if [ "$word" = 3.10 ]; then word={python}; fi
  words+=("$word")
done
exec {uv} "${{words[@]}}"
"""

CURL = """\
#!/bin/bash
case " $* " in
  *//astral.sh/uv/install.sh*)
    echo 'mkdir -p "$UV_INSTALL_DIR" && install -m 755 {programs}/uv "$UV_INSTALL_DIR/uv"' ;;
  *) exec /usr/bin/curl "$@" ;;
esac
"""

SETTING = re.compile(r"UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|OFFLINE)|SSL_CERT_FILE")


def install(lab: Layout) -> None:
    """Writes the programs; needs the account that jobs run as."""
    uv = _find_uv()
    target = lab.programs / "uv-itself"
    if not target.exists() or target.stat().st_size != uv.stat().st_size:
        shutil.copy(uv, target)
    settings = {name: value for name, value in os.environ.items() if SETTING.fullmatch(name)}
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.exists():
        settings.setdefault("SSL_CERT_FILE", str(certificates))
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(settings.items()))
    python = shlex.quote(_find_python(lab))
    texts = {
        "uv": UV.format(settings=exports, python=python, uv=target),
        "curl": CURL.format(programs=lab.programs),
    }
    for name, text in texts.items():
        (lab.programs / name).write_text(text)
    for path in lab.programs.iterdir():
        path.chmod(0o755)


def _find_uv() -> Path:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not found:
        raise LabError("there is no uv beside this Python or on PATH (make setup brings it)")
    return Path(found).resolve()


def _find_python(lab: Layout) -> str:
    """What SkyPilot's own programs on a node may run on."""
    fits = "import sys; sys.exit(not (3, 9) <= sys.version_info[:2] < (3, 13))"
    for python in PYTHONS:
        if Path(python).exists() and may_run(lab, python, "-c", fits):
            return python
    raise LabError(f"there is no Python 3.9 to 3.12 that the account {lab.user} may run (apt-get install python3)")
