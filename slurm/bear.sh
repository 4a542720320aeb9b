#!/usr/bin/env bash
# BEAR as a job array: a task for each model, and a last job that joins them into one report. An entry for BEAR's
# leaderboard is beside each run.
#
#   bash slurm/bear.sh MODEL,MODEL,... [OPTIONS OF megaprompt probe]      check here, then submit both jobs
#   sbatch slurm/bear.sh ...                                              the same, from a job
#
# From the repository's root. Facts are in BEAR or --data (data/bear if not given). Every model is asked with all
# wordings, unless --methods says otherwise. The runs are in OUT/runs, the report is OUT/report.html (--out, runs/bear if
# not given). The same command continues what was interrupted; with more models, these go into the same report.
# Options of sbatch for the array: SBATCH_OPTIONS="--time=1:00:00".
#
#SBATCH --job-name=bear
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1 --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%A_%a.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "bear.sh: start it from the repository's root directory" >&2; exit 2; }
source slurm/common.sh
SCRIPT=slurm/bear.sh

[[ ${1:-} && $1 != -* ]] || usage "$0"
IFS=, read -ra models <<<"$1"
not_given --backbone "models as the first argument" "${@:2}"
arguments=(--data "${BEAR:-data/bear}" --methods manual --deepspeed auto "${@:2}")
out=$(run_directory runs/bear "${@:2}")

# run_of TASK: the model of a task, and the directory of its run.
run_of() {
  check=${models[$1]%/}
  run=$out/runs/${check//\//--} # with all of its path: a/final is not b/final
  options=("${arguments[@]}" --backbone "$check")
}

array_of_runs "$out" ${#models[@]} "$@"
