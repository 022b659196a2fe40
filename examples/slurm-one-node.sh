#!/usr/bin/env bash
# Train on all GPUs of one node:   sbatch examples/slurm-one-node.sh run.yaml
# Before its time is over, or where it is preempted, the run saves and the job queues again, to go on there.
#SBATCH --job-name=fastchgnet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
srun torchrun --standalone --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  -m fastchgnet train "$1" --resume &
run=$!

trap 'asked=1; kill -TERM "$run"' TERM # srun passes the signal on
wait "$run" && exit 0
[[ ${asked:-} ]] || exit 1
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends a wait, too
scontrol requeue "$SLURM_JOB_ID"
