#!/usr/bin/env bash
# Train on all GPUs of several nodes:   sbatch --nodes 8 examples/slurm-several-nodes.sh run.yaml
# The folder of the run must be one that the first node sees at every start; the data are read on all nodes.
#SBATCH --job-name=fastchgnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$first:29400" \
  -m fastchgnet train "$1" --resume &
run=$!

trap 'asked=1; kill -TERM "$run"' TERM # srun passes the signal on
wait "$run" && exit 0
[[ ${asked:-} ]] || exit 1
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends a wait, too
scontrol requeue "$SLURM_JOB_ID"
