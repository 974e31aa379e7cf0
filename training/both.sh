#!/bin/sh
# Train both models side by side on one GPU: `sh training/both.sh OUT MINUTES`. Leaves checkpoints and logs in OUT.
cd "$(dirname "$0")/.." || exit 1
out=$1 minutes=$2
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$out"

train() {
    python3 training/train.py --model "$1" --out "$out/abacus-$1" --seed 0 --steps 60000 --minutes "$minutes" \
        --every 1000 --compile --graph $2 >"$out/$1.log" 2>&1
}

train hybrid &
train mla --apart &
wait
