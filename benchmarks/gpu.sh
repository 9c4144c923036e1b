#!/bin/sh
# Gate, benches and tuning on the GPU of this machine, in less than eight minutes, into one folder to commit.
# Called again it goes on with what is missing. Options: see benchmarks/gpu/session.py, or --help. PYTHON names the Python.
cd "$(dirname "$0")/.." || exit 1
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" benchmarks/gpu/session.py "$@"
