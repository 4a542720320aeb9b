#!/usr/bin/env bash
# GPT2-XL (1.5B) on LAMA: where it fits on one GPU, every rank has a whole copy and no weights travel.
#
#   bash slurm/lama_gpt2_xl.sh [OPTIONS OF megaprompt probe]           check here, then submit
#   sbatch [OPTIONS OF sbatch] slurm/lama_gpt2_xl.sh [OPTIONS ...]     submit, check in the job
#
# From the repository's root. Options that are given again win, so `--out runs/x --relations P36` does what it says.
# The same command continues a run that was interrupted. Site settings: see slurm/site.env.example.
#
#SBATCH --job-name=lama_gpt2_xl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4 --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%j.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "lama_gpt2_xl.sh: submit from the repository's root directory" >&2; exit 2; }
source slurm/common.sh

probe_job "$0" runs/lama_gpt2_xl --backbone "${BACKBONE_GPT2_XL:-gpt2-xl}" --data "${DATA:-data/lama}" --deepspeed auto "$@"
