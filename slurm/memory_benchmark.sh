#!/usr/bin/env bash
# What P-tuning and fine-tuning need in memory on clusters of several sizes: a job for each size, and a last one that
# puts their results into one table and chart.
#
#   bash slurm/memory_benchmark.sh 1,2,4 [OPTIONS OF megaprompt memory]      numbers of nodes
#
# From the repository's root. Models up to Megatron 11B are measured with random weights; what cannot fit is predicted, and
# marked so. `--backbones gpt2-xl,megatron-11b --dtype bfloat16` takes others. Measurements of 2 nodes are in OUT/nodes-2, all together in OUT (--out, runs/memory if not
# given). The same command continues what was interrupted. The jobs of an array are all of one size, so these are no
# array. Options of sbatch for the jobs: SBATCH_OPTIONS="--time=1:00:00". Site settings: see slurm/site.env.example.
#
#SBATCH --job-name=memory_benchmark
#SBATCH --ntasks-per-node=4 --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "memory_benchmark.sh: start it from the repository's root directory" >&2; exit 2; }
source slurm/common.sh

[[ ${1:-} =~ ^[0-9]+(,[0-9]+)*$ ]] || usage "$0"
IFS=, read -ra sizes <<<"$1"
shift
out=$(run_directory runs/memory "$@")

if [[ ${MEGAPROMPT_REPORT:-} ]]; then
  "${PYTHON[@]}" -m megaprompt memory --out "$out" --collect
elif [[ ${SLURM_JOB_ID:-} ]]; then
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  "${PYTHON[@]}" -m megaprompt memory "$@" --out "$out/nodes-$SLURM_JOB_NUM_NODES" --ranks "$SLURM_NTASKS"
else
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  for size in "${sizes[@]}"; do
    jobs+=("$(sbatch --parsable --nodes="$size" "${options[@]}" "$0" "$size" "$@")")
  done
  report=$(MEGAPROMPT_REPORT=1 sbatch --parsable --dependency="afterany:$(IFS=:; echo "${jobs[*]}")" \
    --kill-on-invalid-dep=yes --job-name=memory_report --nodes=1 --ntasks-per-node=1 --gpus-per-node=0 "$0" 1 "$@")
  echo "submitted: ${jobs[*]}, then $report; the table and chart will be in $out"
fi
