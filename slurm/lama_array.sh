#!/usr/bin/env bash
# LAMA as a job array, a task for each relation, and a last job that puts their results together. On many free GPUs it
# ends sooner than one job over all relations, which needs fewer GPU hours, since a pass can serve many relations.
#
#   bash slurm/lama_array.sh P36,P30,... [OPTIONS OF megaprompt probe]      check here, then submit both jobs
#
# From the repository's root. The run of P36 is OUT/P36, all together is OUT (--out, runs/lama_array if not given).
# The same command continues what was interrupted. Options of sbatch for the tasks: SBATCH_OPTIONS="--time=1:00:00".
#
#SBATCH --job-name=lama_array
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1 --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120 --requeue
#SBATCH --output=%x-%A_%a.out --open-mode=append
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "lama_array.sh: start it from the repository's root directory" >&2; exit 2; }
source slurm/common.sh

[[ ${1:-} =~ ^[A-Z][0-9]+(,[A-Z][0-9]+)*$ ]] || usage "$0"
IFS=, read -ra relations <<<"$1"
shift
arguments=(--backbone "${BACKBONE_GPT2_XL:-gpt2-xl}" --data "${DATA:-data/lama}" --deepspeed auto "$@")
out=$(run_directory runs/lama_array "$@")

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  relation=${relations[SLURM_ARRAY_TASK_ID]}
  probe_job "$0" "$out/$relation" "${arguments[@]}" --relations "$relation" --out "$out/$relation"
elif [[ ${MEGAPROMPT_REPORT:-} ]]; then
  "${PYTHON[@]}" -m megaprompt report "$out"
  for relation in "${relations[@]}"; do
    if ! grep -qs '"complete": true' "$out/$relation/results.json"; then
      echo "lama_array.sh: $relation is not complete; see the log of its task" >&2
      missing=1
    fi
  done
  exit "${missing:-0}"
elif [[ ${SLURM_JOB_ID:-} ]]; then
  die "start it with bash, not sbatch: it submits two jobs"
else
  list=$(IFS=,; echo "${relations[*]}")
  MEGAPROMPT_LOGIN_NODE=$(asked_for "$0") "${PYTHON[@]}" -m megaprompt probe "${arguments[@]}" --relations "$list" --out "$out/check" --check
  submit_array "${#relations[@]}" "$list" "$@"
  echo "the table will be in $out/report.html"
fi
