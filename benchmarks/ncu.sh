#!/bin/sh
# Measures kernels of a run with Nsight Compute, one file per rank: OUT/rank0.ncu-rep (OUT: runs/profiles, or $OUT).
# Each kernel is run many times, so profile few steps and stop soon after.
#
#   benchmarks/ncu.sh python fastnet/train.py --network lstm --profile-steps 20:21 --max-steps 21
#   KERNELS='regex:.*' benchmarks/ncu.sh python fastnet/train.py ...      # all kernels; default: fastnet's own
#
# Profile one process, as ranks would wait for each other's replays. $NCU: another ncu; $NCU_FLAGS: more flags.
set -eu
if [ "$#" -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=${OUT:-runs/profiles}
kernels=${KERNELS:-'regex:^(images|forward|backward|project|weight_gradient|input_gradient|pack|unpack)_kernel$'}
mkdir -p "$out"
# shellcheck disable=SC2086  # flags are words
exec "${NCU:-ncu}" \
    --profile-from-start off --target-processes all --nvtx --set full --import-source yes \
    --kernel-name "$kernels" --force-overwrite --export "$out/rank${RANK:-0}" ${NCU_FLAGS:-} "$@"
