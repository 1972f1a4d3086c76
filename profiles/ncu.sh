#!/usr/bin/env bash
# The kernels of one graph under Nsight Compute, on a GPU: by default those of the read of a tick.
#
#     profiles/ncu.sh [-o REPORT] [-g "read T=1 bucket=1024"] [KEY=VALUE ...]
#
# Measures every kernel that runs in the range of that name in the one tick that is named: those of
# the warm-up are outside of the range "tick".
# Leaves REPORT.ncu-rep. NCU and PYTHON name other programs than the first ones on the PATH.
set -euo pipefail

report=read
graph="read T=1 bucket=1024"
while getopts "o:g:" option; do
    case $option in
        o) report=$OPTARG ;;
        g) graph=$OPTARG ;;
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

# A slash stands between a range and the one inside it.
"$ncu" --export "$report" --force-overwrite --graph-profiling node --set roofline \
    --nvtx --nvtx-include "tick/1 read/$graph/" \
    "$python" -m brain.app task=profile nvtx=true task.ticks=1 engine=compiled device=cuda "$@"
