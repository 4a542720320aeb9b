#!/usr/bin/env bash
# Megatron-LM 11B (or any other backbone of that size) on LAMA: its weights are sharded over all GPUs of the job.
#
#   bash slurm/lama_11b.sh [OPTIONS OF megaprompt probe]           check here, then submit
#   sbatch [OPTIONS OF sbatch] slurm/lama_11b.sh [OPTIONS ...]     submit, check in the job
#
# From the repository's root. Options that are given again win, so `--out runs/x --relations P36` does what it says.
# The same command continues a run that was interrupted. Site settings: see slurm/site.env.example.
#
#SBATCH --job-name=lama_11b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4 --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%j.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "lama_11b.sh: submit from the repository's root directory" >&2; exit 2; }
source slurm/common.sh

probe_job "$0" runs/lama_11b \
  --backbone "${BACKBONE_11B:-checkpoints/megatron_11b}" --data "${DATA:-data/lama}" \
  --deepspeed ds_configs/zero3.json "$@"
