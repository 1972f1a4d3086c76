#!/usr/bin/env bash
# The session on a GPU: what decides, in the order of what it is worth, in less than ten minutes.
#
#     profiles/gpu.sh OUT [STEP ...]        # without steps: all that there is time for
#
# Leaves OUT/gpu.json and OUT/gpu.log and prints a summary. What a step is and how the time is spent
# is in gpu_session.py. Nothing is downloaded: weights are seeded and random. The environment:
#
#     PYTHON (python3), DEVICE (cuda), BUDGET (570 seconds), NCU (ncu)
#     WHEELS    a folder of wheels of what is missing there, installed for this session alone
#     REVISION  of a tree that has no .git
#     TINY=1    sizes for a CPU; with DEVICE=cpu kernels are interpreted
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "refused: gpu.sh: give a folder for the results" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/profiles${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=LAZY
if [ "${DEVICE:-cuda}" = cpu ]; then
    export TRITON_INTERPRET=1
fi
if [ "${TINY:-0}" != 0 ]; then
    export TORCHDYNAMO_DISABLE=1 # nothing is captured there, transformers included: it takes a minute
fi
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --find-links "$WHEELS" \
        --target "$site" "$WHEELS"/*.whl || exit 1
    PYTHONPATH=$PYTHONPATH:$site
fi
"$python" "$root/profiles/gpu_session.py" "$@"
