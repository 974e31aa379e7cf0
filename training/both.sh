#!/bin/sh
# Train both models side by side on one GPU: `sh training/both.sh OUT SECONDS`. Leaves OUT/{hybrid,mla}.{tar,log}.
# Compiled and captured where that works; should it fail, the time that is left is trained without.
cd "$(dirname "$0")/.." || exit 1
out=$1 end=$(($(date +%s) + $2)) work=$(mktemp -d)
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

train() {
    for speed in "--compile --graph" "--graph" ""; do
        minutes=$(awk "BEGIN { print ($end - $(date +%s)) / 60 }")
        # shellcheck disable=SC2086
        python3 training/train.py --model "$1" --out "$work/$1" --steps 60000 --every 1000 --minutes "$minutes" $speed && return
        [ $((end - $(date +%s))) -gt 60 ] || return
    done
}

keep() {
    for model in hybrid mla; do
        [ ! -f "$work/$model/config.json" ] || { tar cf "$work/tar" -C "$work" $model && cp "$work/tar" "$out/$model.tar"; }
    done
}

trap keep EXIT
trap 'exit 1' TERM INT
train hybrid >"$out/hybrid.log" 2>&1 &
hybrid=$!
train mla >"$out/mla.log" 2>&1 &
mla=$!
while kill -0 $hybrid 2>/dev/null || kill -0 $mla 2>/dev/null; do
    sleep 15
    keep
done
