#!/usr/bin/env bash
# Runs the tests that need a CUDA device, and those of kernels that elsewhere run in the interpreter, with the Python at hand: tools/gpu_check.sh [pytest arguments]
# WHEELS: a folder of wheels to install first, where packages are missing and nothing can be downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if [[ -n "${WHEELS:-}" ]]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
# References are computed on the CPU: with as many threads as cores in each of several processes they crawl.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
(($#)) || set -- tests/ops tests/run tests/comm tests/transfer
# A machine without compiled kernels compiles for minutes: no test may take that for a hang.
exec "$python" -m pytest -p no:cacheprovider -o timeout=400 -m "gpu or kernels" "$@"
