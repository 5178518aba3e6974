#!/usr/bin/env bash
# The runs of downstream.md: what latent actions save in demonstrations. For each seed stage 1; from it either more of stage 1 or stage 2 on
# latent actions, of equal steps; from both stage 3 on the same n demonstrations; then the same unseen worlds in closed loop. What is there is
# not made again, so it may be stopped and started again; other settings need another RUN. Two hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
P=${PYTHON:-python}
RUN=${RUN:-runs/downstream}
OUT=${OUT:-docs/latent_action}
SEEDS=${SEEDS:-0 1 2}
COUNTS=${COUNTS:-100 200 400}
STEPS1=${STEPS1:-500}
STEPS2=${STEPS2:-1000} # of stage 2, or more of stage 1
STEPS3=${STEPS3:-1200}
VIDEOS=${VIDEOS:-200} # episodes per level without actions
WINDOWS=${WINDOWS:-4000} # of these, encoded once
WORLDS=${WORLDS:-100} # per cell
ACTIONS=${ACTIONS:-100} # per world
MODE=${MODE:-joint}
SET3=${SET3:-lr=1e-3 video_lr=1e-3 muon_lr=0.02 warmup=100 ema=0.99}
LATENT=${LATENT:-} # settings of the latent actions
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

made=
for name in SEEDS COUNTS STEPS1 STEPS2 STEPS3 VIDEOS WINDOWS WORLDS ACTIONS MODE SET3 LATENT; do
  made+="${made:+ }$name='${!name}'"
done
mkdir -p "$RUN"
[ -f "$RUN/settings.txt" ] || echo "$made" > "$RUN/settings.txt"
if [ "$(cat "$RUN/settings.txt")" != "$made" ]; then
  echo "error: $RUN was made with $(cat "$RUN/settings.txt"); expected $made: name another RUN" >&2
  exit 2
fi

windows() { # stage, cache, more
  [ -f "$2" ] || $P data.py cache --stage "$1" --out "$2" --seed "$seed" "${@:3}"
}
stage() { # stage, run, what it writes last, more; one that was cut off begins anew
  [ -f "$2/$3" ] || { rm -rf "$2"; $P train.py --stage "$1" --out "$2" "${@:4}"; }
}
try() { # run, pre-trained run
  stage 3 "$1" curve.png --cache "$D/pool3_n$n.safetensors" --init "$2" --set "seed=$seed" "steps=$STEPS3" $SET3
  [ -f "$1/evaluation.json" ] || $P -m scripts.evaluate --ckpt "$1" --out "$1" --modes "$MODE" --seed $((1000 + seed)) --steps 4 --execute 4 \
    --episodes "$WORLDS" --max-steps "$ACTIONS"
}

for seed in $SEEDS; do
  D=$RUN/seed$seed
  stage latent "$D/latent" latent_action.safetensors --set "seed=$seed" $LATENT
  windows 1 "$D/pool1.safetensors" --episodes "$VIDEOS" --windows "$WINDOWS"
  windows 2 "$D/pool2.safetensors" --episodes "$VIDEOS" --windows "$WINDOWS" --latent "$D/latent"
  stage 1 "$D/stage1" curve.png --cache "$D/pool1.safetensors" --set "seed=$seed" "steps=$STEPS1"
  stage 1 "$D/longer" curve.png --cache "$D/pool1.safetensors" --set "seed=$seed" "steps=$((STEPS1 + STEPS2))"
  stage 2 "$D/stage2" curve.png --cache "$D/pool2.safetensors" --latent "$D/latent" --init "$D/stage1" --set "seed=$seed" "steps=$STEPS2"
  for n in $COUNTS; do
    windows 3 "$D/pool3_n$n.safetensors" --episodes "$n" --windows 8000
    try "$D/longer_n$n" "$D/longer"
    try "$D/stage2_n$n" "$D/stage2"
  done
done
$P -m scripts.paper downstream --run "$RUN" --out "$OUT"
