#!/usr/bin/env bash
# The tests on Python 3.12 with torch 2.11: the other end of what is supported. Prints versions, then runs `pytest`.
# numpy below 2.4, because the interpreter of Triton 3.6 fails with later ones.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-312
uv=.venv/bin/uv
test -x $venv/bin/python || $uv venv --python "${PYTHON312:-python3.12}" $venv
$uv pip install --quiet --python $venv/bin/python "torch==2.11.*" "triton==3.6.*" "torchvision==0.26.*" "numpy<2.4" setuptools wheel ".[test]"
$uv pip uninstall --quiet --python $venv/bin/python bevt_ds
$uv pip install --quiet --python $venv/bin/python --no-deps --no-build-isolation -e .
$venv/bin/python -c 'import sys, torch, triton, deepspeed; print(sys.version.split()[0], torch.__version__, triton.__version__, deepspeed.__version__)'
CI=true $venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" "$@"
