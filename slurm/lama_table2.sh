#!/usr/bin/env bash
# The paper's Table 2 as a job array: a task for each backbone, method and seed, and a last job that joins them into one
# report.
#
#   bash slurm/lama_table2.sh BACKBONE,BACKBONE,... [OPTIONS OF megaprompt probe]      check here, then submit both jobs
#   sbatch slurm/lama_table2.sh ...                                                    the same, from a job
#
# From the repository's root. Answers are the words that all of these backbones can give (as in LAMA-29k), unless --vocab
# says otherwise; facts are in DATA or --data. The runs are in OUT/runs, the report is OUT/report.html (--out,
# runs/lama_table2 if not given). The same command continues what was interrupted. More backbones, on larger machines,
# with the same --out and --vocab go into the same report. Options of sbatch for the tasks:
# SBATCH_OPTIONS="--nodes=2 --time=1:00:00". What is computed, a task for each group of methods and each seed:
# METHODS="manual,p-tuning fine-tuning manual+fine-tuning" SEEDS="0 1 2" bash slurm/lama_table2.sh ...
#
#SBATCH --job-name=lama_table2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1 --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%A_%a.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "lama_table2.sh: start it from the repository's root directory" >&2; exit 2; }
source slurm/common.sh
SCRIPT=slurm/lama_table2.sh

[[ ${1:-} && $1 != -* ]] || usage "$0"
IFS=, read -ra backbones <<<"$1"
not_given --backbone "backbones as the first argument" "${@:2}"
not_given --methods 'METHODS="manual,p-tuning fine-tuning"' "${@:2}"
not_given --seed 'SEEDS="0 1 2"' "${@:2}"
arguments=(--data "${DATA:-data/lama}" --deepspeed auto "${@:2}")
out=$(run_directory runs/lama_table2 "${@:2}")
export METHODS=${METHODS:-manual,p-tuning fine-tuning manual+fine-tuning} SEEDS=${SEEDS:-0}
read -ra groups <<<"$METHODS"
read -ra seeds <<<"$SEEDS"
[[ " ${arguments[*]}" == *" --vocab"* ]] || arguments+=(--vocab "$out/vocabulary.txt")

# run_of TASK: the backbone, methods and seed of a task, and the directory of its run.
run_of() {
  local methods=${groups[$1 % ${#groups[@]}]} seed=${seeds[$1 / ${#groups[@]} % ${#seeds[@]}]}
  local backbone=${backbones[$1 / ${#groups[@]} / ${#seeds[@]}]%/}
  run=$out/runs/${backbone//\//--}-${methods//,/-}-seed$seed # with all of its path: a/final is not b/final
  options=("${arguments[@]}" --backbone "$backbone" --methods "$methods" --seed "$seed")
  check=$backbone all=(--methods "${METHODS// /,}")
}

if [[ -z ${SLURM_ARRAY_TASK_ID:-}${MEGAPROMPT_REPORT:-} && ${arguments[-1]} == "$out/vocabulary.txt" && ! -f $out/vocabulary.txt ]]; then
  "${PYTHON[@]}" -m megaprompt data vocabulary --backbones "$1" --out "$out/vocabulary.txt"
fi
array_of_runs "$out" $((${#backbones[@]} * ${#groups[@]} * ${#seeds[@]})) "$@"
