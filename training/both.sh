#!/bin/sh
# Makes the shipped models anew, one after the other on one GPU: `sh training/both.sh OUT [hybrid|mla]`, one command.
# Every run is made by the tree that made the shipped one, taken out of the repository's history (a shallow clone lacks
# it), with as many steps, and goes on from the run before where the shipped one did. Leaves OUT/RUN/abacus-MODEL and
# OUT/RUN/log of each. PYTHON: the interpreter. FLAGS: options of every run, which come last and win; on a CPU, to try:
# FLAGS="--steps 2 --rows 2 --eval 4".
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd)

run() { # RUN COMMIT MODEL STEPS [options of train.py]
    name=$1 commit=$2 model=$3 steps=$4
    shift 4
    mkdir -p "$out/$name/tree"
    git archive "$commit" training src | tar -x -C "$out/$name/tree"
    echo "$name: $steps steps by the tree of $commit $*"
    # FLAGS are words
    (cd "$out/$name/tree" && exec env PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 "${PYTHON:-python3}" \
        training/train.py --model "$model" --out "$out/$name/abacus-$model" --seed 0 --steps "$steps" "$@" \
        ${FLAGS---compile --graph}) >"$out/$name/log" 2>&1 || { tail "$out/$name/log" >&2; exit 1; }
    tail -n 1 "$out/$name/log"
}

hybrid() {
    run hybrid 8f58911 hybrid 4520 --workers 8
}

mla() {
    run mla-1 3be939a mla 20520
    run mla-2 8f58911 mla 2359 --start "$out/mla-1/abacus-mla" --mix 1 8 1
    run mla-3 3d4618d mla 11445 --start "$out/mla-2/abacus-mla" --mix 1 7 2 --apart --rows 48 --lr 0.008 \
        --adam-lr 0.0012
}

case ${2-both} in
    hybrid | mla) "$2" ;;
    both) hybrid; mla ;;
    *) echo "hybrid, mla or nothing, not $2" >&2; exit 2 ;;
esac
