#!/usr/bin/env bash
# Everything that visparse measures on a GPU, in one call, half an hour: tests, kernels beside their peers, the pipeline that ships, what compensations
# are worth, and searched plans. Writes JSON to a folder.
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
python3 -m visparse.compensation.overlap_bench --out "$out/overlap_look.json"
python3 gallery/compensation/ablation.py --device cuda --grid small --batch 8 --out "$out/ablation_small.json"
python3 gallery/search/compare.py --device cuda --grid long --prompts 6 --seeds 1 --calibration 4 --ranges \
    --targets 0.125 0.25 0.5 --tries 3 --refine 23 3 --seconds 900 --out "$out/search_long.json" --png "$out/search_long.png"
python3 gallery/search/duration.py --model wan-1.3b-480p --device cuda --out "$out/search_duration_wan13b_480p.json"
