#!/usr/bin/env bash
# Everything that visparse measures on a GPU, in one call: tests, operator, and the pipeline that ships. Writes JSON to a folder.
#   gallery/measure_gpu.sh gallery/results
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/pipelines${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python3 -m pytest -q -m gpu -p no:cacheprovider ${PYTEST_ARGS:-}
python3 kernels/benchmarks/attend.py --device cuda --tokens 9216 --heads 4 --head-dim 64 --json "$out/attend_cuda_d64.json"
python3 kernels/benchmarks/attend.py --device cuda --tokens 32768 --heads 24 --head-dim 128 --json "$out/attend_cuda_d128.json"
python3 -m visparse.cli demo --device cuda --repeats 5 --out "$out/page" --json > "$out/demo_cuda.json"
