#!/usr/bin/env bash
# All of docs/metaworld: recordings, the model, what demonstrations and stages 1 and 2 are worth, and two robots in one model. What is there
# is not made again. About eight hours on one core; PYTHON names a Python with the extras sim, data and flow.
set -euo pipefail
cd "$(dirname "$0")/../.."
P=${PYTHON:-python}
EIGHT=faucet-open,faucet-close,drawer-open,button-press-topdown,plate-slide,door-unlock,handle-press,window-open
OTHERS=drawer-close,window-close,coffee-button,button-press,handle-press-side,plate-slide-side,dial-turn,door-lock
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p data runs/metaworld

record() { # folder, tasks, episodes of each, seed, rows after success
  [ -d "data/$1" ] || $P -m scripts.record --sim metaworld --tasks "$2" --episodes "$3" --seed "$4" --after "$5" --noise 0.2 --recovery 0.5 \
    --workers 1 --set cameras=corner4 --out "data/$1"
}
windows() { # stage, data, most, cache
  [ -f "runs/metaworld/$4.safetensors" ] || $P data.py cache --data "data/$2" --stage "$1" --preset sim --windows "$3" --out "runs/metaworld/$4.safetensors"
}
stage() { # stage, cache, run, more
  compgen -G "runs/metaworld/$3/step_*" > /dev/null || $P train.py --stage "$1" --preset sim --cache "runs/metaworld/$2.safetensors" --out "runs/metaworld/$3" "${@:4}"
}
try() { # run, dataset whose tasks it is tried in, folder of the result, Euler steps, more
  [ -f "docs/metaworld/$3/evaluation.json" ] || $P -m scripts.evaluate --sim "${SIM:-metaworld}" --like "data/$2" --ckpt "runs/metaworld/$1" --seed 0 1 2 \
    --execute 8 --workers 1 --out "docs/metaworld/$3" --steps "$4" "${@:5}"
}

# The model: a hundred demonstrations of each task. The backbones are in weights/sim; data/backbones.json made them.
record eight $EIGHT 40 0 10
record more $EIGHT 60 1 10
echo '{"sources": [{"path": "eight", "level": 6}, {"path": "more", "level": 3}]}' > data/backbones.json
echo '{"sources": [{"path": "eight", "level": 6, "weight": 4}, {"path": "more", "level": 6, "weight": 6}]}' > data/hundred.json
windows 3 hundred.json 20000 hundred
stage 3 hundred main
try main eight one_step 1 --modes joint,vla --episodes 25 --gif 1 --random --expert
try main eight two_steps 2 --modes joint,vla --episodes 25 --gif 1

# How many demonstrations, and what stages 1 and 2 on video of eight other tasks are worth; each arm 1500 steps of stage 3.
record ten $EIGHT 10 0 10
record others $OTHERS 60 2 4
windows 3 ten 20000 ten
echo '{"sources": [{"path": "others", "level": 3, "latents": "others_latent"}]}' > data/others.json
windows 1 others.json 5000 video
stage 1 video stage1
L="--data data/others --side 96"
[ -f runs/metaworld/dcae.safetensors ] || $P -m scripts.latents pretrain --preset sim --labelled --init weights/toy/dcae.safetensors $L --steps 600 \
  --out runs/metaworld/dcae.safetensors
$P -m scripts.latents tokens --preset sim --labelled 0.1 --dcae runs/metaworld/dcae.safetensors $L --out runs/metaworld/tokens
[ -f runs/metaworld/latent/latent_action.safetensors ] || $P train.py --stage latent --preset sim --init runs/metaworld/dcae.safetensors --cache runs/metaworld/tokens \
  --out runs/metaworld/latent
$P -m scripts.latents encode --weights runs/metaworld/latent/latent_action.safetensors $L --out data/others_latent
windows 2 others.json 5000 latents
stage 2 latents stage2 --init runs/metaworld/stage1
arm() { # run, cache, more
  stage 3 "$2" "$1" --steps 1500 "${@:3}"
  try "$1" ten "$1" 1 --modes joint --episodes 10
}
arm ten ten
arm ten_stage1 ten --init runs/metaworld/stage1
arm ten_stage2 ten --init runs/metaworld/stage2
arm hundred hundred

# Two robots in one model: the Sawyer arm of MetaWorld, and the two arms of ALOHA. The second is alone first; `main` is the first alone.
arms() { # folder, episodes, seed
  [ -d "data/$1" ] || $P -m scripts.record --sim aloha --tasks transfer-cube --episodes "$2" --seed "$3" --noise 0.03 --after 10 --workers 1 \
    --set hold=2.5 --out "data/$1"
}
card() { # file, weight of the Sawyer, weight of the arms; 0 leaves a robot out
  local sources=
  for source in eight:4:sawyer:$2 more:6:sawyer:$2 aloha:4:aloha:$3 aloha2:6:aloha:$3; do
    IFS=: read -r path weight robot times <<< "$source"
    [ "$times" = 0 ] || sources+="${sources:+, }{\"path\": \"$path\", \"level\": 6, \"weight\": $((weight * times)), \"embodiment\": \"$robot\"}"
  done
  echo "{\"sources\": [$sources]}" > "data/$1"
}
arms aloha 100 0
arms aloha2 200 1
card sawyer.json 1 0
card arms.json 0 1
card two.json 1 1
card more_arms.json 1 3
windows 3 arms.json 20000 arms
stage 3 arms arms
SIM=aloha try arms aloha aloha 1 --modes joint,vla --episodes 50 --gif 1 --random --expert
windows 3 two.json 40000 two
stage 3 two two --steps 12000
SIM=aloha try two aloha two_aloha 1 --robot aloha --modes joint --episodes 50
try two eight two_sawyer 1 --robot sawyer --modes joint --episodes 25

# The same with a VLM that was taught both robots, and longer; together, three windows of the arms come with one of the Sawyer.
[ -f runs/metaworld/taught/card.json ] || $P -m scripts.pretrain --preset sim --data data/two.json --keep vae --steps 2400 \
  --out runs/metaworld/taught
export MOTUS_BACKBONES=runs/metaworld/taught
windows 3 sawyer.json 20000 taught_sawyer
windows 3 arms.json 20000 taught_arms
windows 3 two.json 40000 taught_two
stage 3 taught_sawyer taught_sawyer --steps 8000 --set compile=1
stage 3 taught_arms taught_arms --steps 8000 --set compile=1
stage 3 taught_two taught_two --steps 16000 --set compile=1 --data data/more_arms.json
try taught_sawyer eight taught_sawyer 1 --modes joint --episodes 25
SIM=aloha try taught_arms aloha taught_aloha 1 --modes joint --episodes 50 --gif 1
SIM=aloha try taught_two aloha taught_two_aloha 1 --robot aloha --modes joint --episodes 50 --gif 1
try taught_two eight taught_two_sawyer 1 --robot sawyer --modes joint --episodes 25
