#!/bin/bash
# Two machines of eight GPUs; SLURM starts all sixteen processes itself.
# sbatch slurm-gpus.sh recipe.yaml
#SBATCH --job-name=abba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the time is up: the run then stops after the step at hand, with a checkpoint.
#SBATCH --signal=TERM@120

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

srun --kill-on-bad-exit=1 abba train "$1" --launcher none
code=$?

# 143: stopped by SIGTERM. The same command goes on from the checkpoint.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
