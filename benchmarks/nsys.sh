#!/bin/sh
# Records a run with Nsight Systems, one file per rank: OUT/rank0.nsys-rep and so on (OUT: runs/profiles, or $OUT).
#
#   benchmarks/nsys.sh python fastnet/train.py --network lstm --profile-steps 20:25 --max-steps 25
#   torchrun --nproc_per_node=8 --no-python benchmarks/nsys.sh python fastnet/train.py --profile-steps 20:25 --max-steps 25
#
# Without --profile-steps nothing is recorded. $NSYS: another nsys; $NSYS_FLAGS: more flags, in
# place of --sample=process-tree.
set -eu
if [ "$#" -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=${OUT:-runs/profiles}
mkdir -p "$out"
# shellcheck disable=SC2086  # flags are words
exec "${NSYS:-nsys}" profile \
    --capture-range=cudaProfilerApi --capture-range-end=stop \
    --trace=cuda,nvtx,cudnn,cublas,osrt --cuda-graph-trace=node \
    --force-overwrite=true --output="$out/rank${RANK:-0}" ${NSYS_FLAGS:---sample=process-tree} "$@"
