#!/bin/bash
# Each task's `setup` runs this on its machine: it installs what the image lacks, then calls `make setup-train`, which
# makes the trainer's environment, .venv-train. SkyPilot's images have Python 3.10 (Ubuntu 22.04; uv brings a newer one);
# its images for pods have no make. Takes seconds when nothing has changed.
set -eo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.local/bin:$PATH"

if ! command -v make > /dev/null; then
  sudo=$(command -v sudo || true)
  $sudo apt-get update -qq > /dev/null
  $sudo apt-get install -qq -y make > /dev/null
fi

python=python3
if ! python3 -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2> /dev/null; then
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  python=.venv-train/bin/python
  # Only make says when an environment is whole: what was half made is made anew.
  [ -e .venv-train/.ready ] || { rm -rf .venv-train; uv venv --quiet --seed --python 3.11 .venv-train; }
fi
exec make setup-train PYTHON="$python"
