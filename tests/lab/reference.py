"""What a job of the lab has to end with: the same training on this machine alone, with nothing taken away."""

import os
import subprocess
import sys
from pathlib import Path

from spotune.core.keys import Keys
from spotune.core.records import Certificate
from spotune.core.store import Store

ROOT = Path(__file__).parents[2]


def undisturbed(home: Path, config: str, *words: str) -> str:
    """``weights_sha256`` of the config's training on ``--infra local``, with ``home`` for its state."""
    spotune = str(Path(sys.executable).with_name("spotune"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPOTUNE_", "SKYPILOT_"))}
    command = [spotune, "train", config, "--infra", "local", "--name", "reference", "-y", *words]
    done = subprocess.run(
        command, env={**kept, "SPOTUNE_HOME": str(home)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data = Store(f"file://{home}/bucket").read(Keys("reference").completed)
    assert data
    return Certificate.from_bytes(data).weights_sha256
