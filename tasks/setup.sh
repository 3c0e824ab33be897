#!/bin/bash
# What each task's `setup` runs on its machine: `make setup`, after what the image lacks for it. SkyPilot's images have
# Python 3.10 (Ubuntu 22.04; uv brings its own), those for pods no make. In seconds when nothing has changed.
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
  python=.venv/bin/python
  # Only make says when an environment is whole: what was half made is made anew.
  [ -e .venv/.ready ] || { rm -rf .venv; uv venv --quiet --seed --python 3.11 .venv; }
fi
exec make setup PYTHON="$python"
