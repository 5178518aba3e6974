#!/bin/bash
# Stage 2 on four nodes of eight GPUs: torchrun meets on the first node, each node holds one copy of the weights (shards=8).
#   sbatch docs/slurm.sh
# The run folder and the cache lie on a file system that all nodes share. When the time is nearly up the run saves and ends (minutes), the
# job puts itself in the queue again, and the next one continues from the newest complete checkpoint, on whatever number of nodes it gets.
#SBATCH --job-name=motus-stage2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RUN=${RUN:-runs/stage2}
INIT=${INIT:-runs/stage1}
LATENT=${LATENT:-runs/latent}
CACHE=${CACHE:-caches/stage2.safetensors}
STEPS=${STEPS:-500000}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

resume=()
if compgen -G "$RUN/step_*" > /dev/null; then resume=(--resume); fi

# One launcher per node; it starts eight ranks and ends them all if one fails.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 0 --shutdown-timeout 900 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    train.py --full --stage 2 --out "$RUN" --init "$INIT" --latent "$LATENT" --cache "$CACHE" "${resume[@]}" \
    --set steps="$STEPS" shards=8 micro=8 workers=4 minutes=1410 timeout=1800 peak=989

newest=$(ls -d "$RUN"/step_* | tail -n 1)
if (( 10#${newest##*_} < STEPS )); then scontrol requeue "$SLURM_JOB_ID"; fi
