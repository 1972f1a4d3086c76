#!/usr/bin/env bash
# The kernels of a tick under Nsight Compute, on a GPU: the first of them are those of the read.
#
#     profiles/ncu.sh [-o REPORT] [-n KERNELS] [-g "patch tick W=1"] [KEY=VALUE ...]
#
# Measures the kernels of the one tick that is named, between cudaProfilerStart and -Stop: with -n so
# many of them, with -g those of one graph. A kernel is run a dozen times to be measured, and a tick
# has hundreds: -n 40 is the head of a read and its first two layers. Clocks are left as they are.
# Leaves REPORT.ncu-rep. NCU and PYTHON name other programs than the first ones on the PATH.
set -euo pipefail

report=read
some=()
while getopts "o:n:g:" option; do
    case $option in
        o) report=$OPTARG ;;
        n) some+=(--launch-count "$OPTARG") ;;
        g) some+=(--nvtx --nvtx-include "$OPTARG/") ;; # the slash: a range that is pushed and popped
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
ncu=${NCU:-ncu}
python=${PYTHON:-python}
if ! command -v "$ncu" >/dev/null; then
    echo "refused: $ncu is not there: install Nsight Compute" >&2
    exit 2
fi
if ! command -v nvidia-smi >/dev/null; then
    echo "refused: no NVIDIA GPU here: Nsight Compute measures kernels of a GPU alone" >&2
    exit 2
fi

"$ncu" --export "$report" --force-overwrite --graph-profiling node --set roofline \
    --clock-control none --profile-from-start off ${some[@]+"${some[@]}"} \
    "$python" -m brain.app task=profile nvtx=true task.ticks=1 engine=compiled device=cuda "$@"
