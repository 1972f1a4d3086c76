#!/usr/bin/env bash
# A session in Nsight Systems: warm-up, prime and ticks of the brain, every step and graph by name.
#
#     profiles/nsys.sh [-o REPORT] [KEY=VALUE ...]        # keys as for brain; engine=compiled if none
#
# Leaves REPORT.nsys-rep, to open in Nsight Systems, and REPORT.sqlite, for profiles/nsight_report.py.
# NSYS and PYTHON name other programs than the first ones on the PATH. A report holds the whole
# environment of the process that was watched: look at it before you give it to others.
set -euo pipefail

report=brain
if [ "${1:-}" = -o ]; then
    report=${2:?nsys.sh: -o needs a name}
    shift 2
fi
nsys=${NSYS:-nsys}
python=${PYTHON:-python}
if ! command -v "$nsys" >/dev/null; then
    echo "refused: $nsys is not there: install Nsight Systems, or run brain task=profile without it" >&2
    exit 2
fi
case " $* " in *" engine="*) ;; *) set -- engine=compiled "$@" ;; esac

"$nsys" profile --output "$report" --force-overwrite true --export sqlite \
    --trace nvtx,cuda --cuda-graph-trace node --sample none --cpuctxsw none \
    "$python" -m brain.app task=profile nvtx=true "$@"
