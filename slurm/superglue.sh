#!/usr/bin/env bash
# SuperGLUE as a job array: a task for each backbone, group of methods, seed and task of SuperGLUE, and a last job that
# joins them into one report, in the layout of the paper's Tables 3 to 5.
#
#   bash slurm/superglue.sh BACKBONE,BACKBONE,... [OPTIONS OF megaprompt superglue]    check here, then submit both jobs
#   sbatch slurm/superglue.sh ...                                                      the same, from a job
#
# From the repository's root. Examples are in SUPERGLUE or --data (data/fewglue if not given; for full training data
# --data data/superglue --setting full). A run has a directory for each of its tasks, OUT/runs/RUN/TASK; the report is
# OUT/report.html (--out, runs/superglue if not given). The same command continues what was interrupted. Options of
# sbatch for the array: SBATCH_OPTIONS="--time=1:00:00". What is computed, a task for each group of methods, seed and
# task: METHODS="manual,in-context,p-tuning manual+fine-tuning" SEEDS="0 1 2" TASKS="cb rte wsc" bash slurm/superglue.sh ...
#
#SBATCH --job-name=superglue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1 --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%A_%a.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "superglue.sh: start it from the repository's root directory" >&2; exit 2; }
source slurm/common.sh
SCRIPT=slurm/superglue.sh COMMAND=superglue PARTS=1

[[ ${1:-} && $1 != -* ]] || usage "$0"
IFS=, read -ra backbones <<<"$1"
not_given --backbone "backbones as the first argument" "${@:2}"
not_given --methods 'METHODS="manual,p-tuning fine-tuning"' "${@:2}"
not_given --seed 'SEEDS="0 1 2"' "${@:2}"
not_given --tasks 'TASKS="cb rte"' "${@:2}"
arguments=(--data "${SUPERGLUE:-data/fewglue}" --deepspeed auto "${@:2}")
out=$(run_directory runs/superglue "${@:2}")
export METHODS=${METHODS:-manual,in-context,p-tuning} SEEDS=${SEEDS:-0}
export TASKS=${TASKS:-boolq cb copa multirc rte wic wsc}
read -ra groups <<<"$METHODS"
read -ra seeds <<<"$SEEDS"
read -ra tasks <<<"$TASKS"

# run_of TASK: the backbone, methods, seed and task of SuperGLUE of a task, and the directory of its run.
run_of() {
  local name=${tasks[$1 % ${#tasks[@]}]} rest=$(($1 / ${#tasks[@]}))
  local methods=${groups[rest % ${#groups[@]}]} seed=${seeds[rest / ${#groups[@]} % ${#seeds[@]}]}
  local backbone=${backbones[rest / ${#groups[@]} / ${#seeds[@]}]%/}
  run=$out/runs/${backbone//\//--}-${methods//,/-}-seed$seed/$name
  options=("${arguments[@]}" --backbone "$backbone" --methods "$methods" --seed "$seed" --tasks "$name")
  check="$backbone, $methods" all=(--tasks "${TASKS// /,}")
}

array_of_runs "$out" $((${#backbones[@]} * ${#groups[@]} * ${#seeds[@]} * ${#tasks[@]})) "$@"
