#!/bin/bash
# Two machines of eight GPUs; SLURM starts one task on each, and abba starts a process for every GPU there.
# sbatch slurm-machines.sh recipe.yaml
#SBATCH --job-name=abba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the time is up: the run then stops after the step at hand, with a checkpoint.
#SBATCH --signal=TERM@120

export RECIPE=$1
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN
# What the processes have for that step and checkpoint, in seconds; 600 if not given.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

srun --kill-on-bad-exit=1 bash -c \
  'exec abba train "$RECIPE" --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" --main-address "$MAIN:29500"'
code=$?

# 143: stopped by SIGTERM. The same command goes on from the checkpoint.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
