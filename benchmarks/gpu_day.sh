#!/usr/bin/env bash
# All that is to be run when a GPU is at hand for minutes. Each stage has its own time limit, writes its results as they come, and does
# not stop the next one by failing.
#
#     benchmarks/gpu_day.sh OUT [STAGE ...]        # default: all stages but cifar2, which needs data: CIFAR2=folder
#     benchmarks/gpu_day.sh OUT --dry [STAGE ...]  # the same code at tiny sizes on a CPU
#
# The small files of results lie in OUT, and OUT/logs.tar.gz holds the logs of all stages.
# WHEELS=folder installs what the machine lacks first (benchmarks/gpu_parcel.py makes it), into SCRATCH/site-packages.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
scratch=${SCRATCH:-${TMPDIR:-/tmp}/hf_trak_gpu_day}
logs=${LOGS:-$scratch/logs}; mkdir -p "$logs"
site=$scratch/site-packages # by this name dill knows installed packages, and does not pickle them by their content
dry=; [ "${1:-}" = --dry ] && { dry=1; shift; }
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
python=${PYTHON:-python3}

stage() { # name, seconds, command ...
  local name=$1 limit=$2 begin=$SECONDS; shift 2
  [ -n "$dry" ] && limit=$((4 * limit))  # a dry run may share its CPUs
  echo "=== $name: $*"
  timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
  local code=$?
  tail -n "${TAIL:-12}" "$logs/$name.log" | cut -c1-300
  echo "=== $name: exit $code after $((SECONDS - begin)) s" | tee -a "$out/stages.txt"
}

run_wheels() {
  [ -n "${WHEELS:-}" ] || return 0
  stage wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
}
run_versions() {
  stage versions 30 "$python" -c "import torch, transformers, datasets, sys
print(sys.version, torch.__version__, torch.version.cuda, transformers.__version__, datasets.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', torch.get_num_threads(), 'threads')"
}
run_fast_jl() { # its setup names an architecture that CUDA 13 has dropped
  local sources; sources=$(ls "${WHEELS:-/nowhere}"/fast_jl-*.tar.gz 2>/dev/null | head -1)
  [ -n "$sources" ] || { echo "=== fast_jl: no sources"; return 0; }
  rm -rf "$scratch/fast_jl" && mkdir "$scratch/fast_jl" && tar xzf "$sources" -C "$scratch/fast_jl" --strip-components 1
  sed -i 's/7\.0+PTX/9.0/' "$scratch/fast_jl/setup.py"
  stage fast_jl 150 "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" "$scratch/fast_jl"
}
run_tests() {
  if [ -n "$dry" ]; then
    HF_TRAK_TEST_DEVICE=cpu stage tests 300 "$python" -m pytest -q -n 0 -p no:cacheprovider -p no:benchmark -k "trainer or llama-2048" tests/test_on_cuda.py
  else
    stage tests 200 "$python" -m pytest -q -n "${TEST_WORKERS:-6}" -p no:cacheprovider -p no:benchmark -m gpu $(grep -l "mark.gpu" tests/test_*.py | grep -v fast_jl)
  fi
}
run_fast_jl_tests() { stage fast_jl_tests 60 "$python" -m pytest -q -n 0 -p no:cacheprovider -p no:benchmark tests/test_fast_jl.py; }
run_featurize() {
  local size=(--profile); [ -n "$dry" ] && size=(--device cpu --scale tiny --rounds 2 --proj_dim 256)
  stage featurize 200 "$python" benchmarks/gpu.py "${size[@]}" --output "$out/gpu_featurize.json"
}
run_index() {
  local size=(); [ -n "$dry" ] && size=(--scale tiny --proj_dim 256 --queries 5 --top_k 3)
  stage index 110 "$python" benchmarks/gpu_index.py "${size[@]}" --output "$out/gpu_index.json"
}
run_cifar2() {
  local size=(--seconds "${CIFAR2_SECONDS:-230}"); [ -n "$dry" ] && size=(--device cpu --scale tiny --seconds 60)
  stage cifar2 "$((${CIFAR2_SECONDS:-230} + 40))" "$python" benchmarks/gpu_cifar2.py --data "${CIFAR2:?the folder of CIFAR-2}" "${size[@]}" --output "$out/gpu_cifar2.json"
}

stages=("$@"); [ ${#stages[@]} -eq 0 ] && stages=(wheels versions tests featurize index fast_jl fast_jl_tests)
for name in "${stages[@]}"; do
  "run_$name"
  tar czf "$out/logs.tar.gz" -C "$logs" .
done
echo; cat "$out/stages.txt"
