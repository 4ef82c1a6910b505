#!/usr/bin/env bash
# Runs a config under SLURM, one task per GPU, and goes on in a new job when the time is up.
#
#   sbatch --nodes=2 experiments/launching/slurm.sh --config configs/imagenet.py --workdir /shared/runs/imagenet
#
# Submit it from the checkout, on a file system that all nodes see; so must the workdir be.
#SBATCH --job-name=rdm-jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end each task gets SIGTERM; the run saves and exits with status 143.
#SBATCH --signal=TERM@300
set -uo pipefail

srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -m rdm_jax.main "$@"
status=$?
if [[ $status == 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
