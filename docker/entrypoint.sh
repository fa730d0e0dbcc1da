#!/usr/bin/env bash
# Trains on all GPUs of the container, or in one process if it has none. Takes the arguments of train.py.
# FASTNET_RANKS sets another number of ranks.
set -euo pipefail
ranks=${FASTNET_RANKS:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}
if [[ $ranks == 1 ]]; then
    exec python -m fastnet.train "$@"
fi
# The local address is given because a container cannot always look up its own name.
exec torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node="$ranks" --max-restarts=3 --shutdown-timeout=120 \
    -m fastnet.train "$@"
