#!/bin/bash
# Stage 2 on four nodes of eight GPUs: torchrun meets on the first node, each node holds one copy of the weights (shards=8).
#   sbatch docs/slurm.sh
# The run folder and the cache lie on a file system that all nodes share. A quarter of an hour before the time is up, or when it is preempted,
# the run saves and ends; the job puts itself in the queue again if it got any further, and the next one continues from the newest complete
# checkpoint, on whatever number of nodes it gets.
#SBATCH --job-name=motus-stage2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RUN=${RUN:-runs/stage2}
INIT=${INIT:-runs/stage1}
LATENT=${LATENT:-runs/latent}
CACHE=${CACHE:-caches/stage2.safetensors}
STEPS=${STEPS:-500000}
ENVIRONMENT=${ENVIRONMENT:-.venv}
# The interface of the nodes over which ranks find each other; NCCL takes InfiniBand by itself for what is large.
INTERFACE=${INTERFACE:-$(ip -o -4 route show to default | awk '{print $5; exit}')}

source "$ENVIRONMENT/bin/activate"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK    # srun does not inherit it: torchrun and all its ranks would share one core
export OMP_NUM_THREADS=8
export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000    # which collective hung, beside the watchdog's word of who
export LOCAL=${TMPDIR:-/tmp}/motus-$SLURM_JOB_ID    # compilers' caches on each node's own disk, not 32 ranks in one home
export TORCHINDUCTOR_CACHE_DIR=$LOCAL/inductor TRITON_CACHE_DIR=$LOCAL/triton
ulimit -n "$(ulimit -Hn)"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

mkdir -p "$RUN"
reached() { find "$RUN" -maxdepth 1 -name 'step_*' | sed 's/.*step_0*//' | sort -n | tail -n 1; }

resume=()
if [[ -n $(ls "$RUN") ]]; then resume=(--resume); fi    # with or without a checkpoint
before=$(reached)

# One launcher per node; it starts eight ranks and ends them all if one fails. A signal makes it end with a status of its own.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 0 --shutdown-timeout 800 \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    train.py --full --stage 2 --out "$RUN" --init "$INIT" --latent "$LATENT" --cache "$CACHE" ${resume[@]+"${resume[@]}"} \
    --set steps="$STEPS" shards=8 workers=4 timeout=1800 peak=989 || echo "srun ended with $?"

after=$(reached)
if (( ${after:-0} > ${before:-0} && ${after:-0} < STEPS )); then scontrol requeue "$SLURM_JOB_ID"; fi
