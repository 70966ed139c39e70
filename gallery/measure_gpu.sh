#!/usr/bin/env bash
# Everything that visparse measures on a GPU, in one call: tests, kernels beside their peers, and the pipeline that ships. Writes JSON to a folder.
#   gallery/measure_gpu.sh gallery/results
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/pipelines${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python3 -m pytest -q -m gpu -p no:cacheprovider ${PYTEST_ARGS:-}
python3 -m visparse.cli bench kernels --device cuda --out "$out/kernels_cuda.json"
python3 -m visparse.cli bench kernels --device cuda --case demo --seconds 60 --out "$out/kernels_cuda_demo.json"
python3 -m visparse.cli bench compile --device cuda --seconds 60 --out "$out/compile_cuda.json"
python3 -m visparse.cli bench step --device cuda --out "$out/step_cuda.json"
python3 -m visparse.cli demo --device cuda --repeats 5 --out "$out/page" --json > "$out/demo_cuda.json"
