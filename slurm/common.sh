# shellcheck shell=bash
# What the scripts in this directory share. They source it in the repository's root directory.

die() {
  echo "${SLURM_JOB_NAME:-$(basename "$0")}: $*" >&2
  exit 2
}

# Print the comment at the head of a script, and end.
usage() {
  sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$1"
  exit "${2:-2}"
}

# The directory of a run: DEFAULT, or what --out among the other arguments says.
run_directory() {
  local out=$1
  shift
  while (($#)); do
    case $1 in
      --out) out=${2:-} ;;
      --out=*) out=${1#--out=} ;;
    esac
    shift
  done
  echo "$out"
}

# not_given OPTION INSTEAD ARGUMENTS...: end if an option is given that each task of an array gets from its script.
not_given() {
  local option=$1 instead=$2 argument
  shift 2
  for argument in "$@"; do
    [[ $argument != "$option" && $argument != "$option="* ]] || die "$option: give $instead instead"
  done
}

# asked_for SCRIPT: nodes and ranks of each, as NODES*RANKS, that the script and SBATCH_OPTIONS ask for. With GPU_MEMORY and
# HOST_MEMORY of site.env the check on a login node judges by them whether the run fits.
asked_for() {
  local options nodes ranks
  options=$(sed -n 's/^#SBATCH//p' "$1")" ${SBATCH_OPTIONS:-}"
  nodes=$(grep -oP -- '--nodes[= ]\K[0-9]+' <<<"$options" | tail -n 1 || true)
  ranks=$(grep -oP -- '--ntasks-per-node[= ]\K[0-9]+' <<<"$options" | tail -n 1 || true)
  echo "${nodes:-1}*${ranks:-1}"
}

# probe_job SCRIPT OUT ARGUMENTS...
# In a job: run COMMAND of megaprompt (probe, if not set) on all tasks, survive the time limit, and continue what is
# already in the run's directory. On a login node: check the arguments and submit SCRIPT, with the arguments that it was
# started with.
probe_job() {
  local script=$1 name=${SLURM_JOB_NAME:-$(basename "$1")} out started end step="" code=1 time_is_up="" signalled=""
  local command=${COMMAND:-probe}
  shift

  # Slurm sends USR1 to this script some time before the limit (#SBATCH --signal). The ranks are told, write a
  # checkpoint and stop; then the job goes back into the queue under the same id.
  started=$(date +%s)
  trap 'time_is_up=1 signalled=1; [[ ! $step ]] || kill -USR1 "$step" || true' USR1 # srun passes it on to the tasks

  local arguments=(--out "$@")
  out=$(run_directory "$1" "${@:2}")
  # A start after an interruption, or after the time limit: everything that is there already is used.
  [[ -f $out/config.yaml ]] && arguments+=(--resume)

  # Seconds, one process, no weights: options, backbone, data, disk, memory, versions. Ends here if something is wrong.
  [[ ${SLURM_JOB_ID:-} ]] || MEGAPROMPT_LOGIN_NODE=$(asked_for "$script") # whose own memory does not matter
  export MEGAPROMPT_LOGIN_NODE
  "${PYTHON[@]}" -m megaprompt "$command" "${arguments[@]}" --check || die "the check failed, see above; no rank was started"

  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    unset MEGAPROMPT_LOGIN_NODE
    local options
    read -ra options <<<"${SBATCH_OPTIONS:-}"
    exec sbatch "${options[@]}" "$script" "${SUBMITTED[@]}"
  fi

  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # When the job ends, which older Slurms do not tell it: no checkpoint is begun that would not be complete by then.
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null || true)
    [[ -z $end ]] || SLURM_JOB_END_TIME=$(date -d "$end" +%s 2>/dev/null || true)
  fi
  export SLURM_JOB_END_TIME
  if [[ ! $time_is_up ]]; then
    # A rank that fails takes the others along. In the background, since bash runs traps between foreground commands.
    srun --kill-on-bad-exit=1 "${PYTHON[@]}" -m megaprompt "$command" "${arguments[@]}" &
    step=$!
    while signalled=; do
      code=0
      wait "$step" || code=$?
      [[ $signalled ]] || break # else it was the signal that ended `wait`
    done
    ((code)) || exit 0
  fi

  if [[ $time_is_up ]]; then
    if [[ -z $(find "$out/state" "$out/results.json" -newermt "@$started" 2>/dev/null) ]]; then
      die "the time limit came before anything could be saved; give more time (sbatch --time)"
    fi
    echo "$name: time is nearly up; job $SLURM_JOB_ID goes back into the queue and will continue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this start
  fi
  echo "$name: it ended with exit code $code; the same sbatch command continues it" >&2
  exit "$code"
}

# submit_array TASKS ARGUMENTS...
# On a login node, or in a job: submit this script as an array, and once more for a report when all tasks have ended.
submit_array() {
  local last=$(($1 - 1)) options array report script=${SCRIPT:-$0}
  shift
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  array=$(sbatch --parsable --array="0-$last" "${options[@]}" "$script" "$@")
  # afterany: the report says what is missing. (afterok would be cancelled, by the option after it, if a task failed.)
  report=$(MEGAPROMPT_REPORT=1 sbatch --parsable --dependency="afterany:$array" --kill-on-invalid-dep=yes \
    --job-name="$(basename "$script" .sh)_report" --output=%x-%j.out --nodes=1 --ntasks-per-node=1 --gpus-per-node=0 \
    --signal=TERM@10 "$script" "$@")
  echo "submitted: array $array, then report $report"
}

run="" check="" options=() all=() # set by run_of

# array_of_runs OUT TASKS ARGUMENTS...
# What a script does whose array has a run for each task. `run_of TASK` sets `run`, its directory, `options`, with which
# COMMAND makes it, and `check`, what is checked before the start, once each, with the options `all` behind the others.
# In a task of the array: that run. In the last job: the report over OUT/runs/*, or, with PARTS, over directories of runs
# there; it fails if a run is not complete. Else, with bash or sbatch: check, and submit both with ARGUMENTS, those that
# the script was started with.
array_of_runs() {
  local out=$1 count=$2 task missing="" results checked="|"
  shift 2
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run_of "$SLURM_ARRAY_TASK_ID"
    probe_job "$SCRIPT" "$run" "${options[@]}" --out "$run"
  elif [[ ${MEGAPROMPT_REPORT:-} ]]; then
    if [[ ${PARTS:-} ]]; then # a run of which no part is complete has no scores yet
      mapfile -t results < <(grep -ls '"complete": true' "$out"/runs/*/*/results.json)
      ((${#results[@]} == 0)) || mapfile -t results < <(printf '%s\n' "${results[@]%/*/results.json}" | sort -u)
    else
      results=("$out"/runs/*/results.json)
      results=("${results[@]%/results.json}")
    fi
    [[ ! -e ${results[0]:-} ]] || "${PYTHON[@]}" -m megaprompt report "${results[@]}" --out "$out"
    for ((task = 0; task < count; task++)); do
      run_of "$task"
      if ! grep -qs '"complete": true' "$run/results.json"; then
        echo "$(basename "$SCRIPT"): $run is not complete; see the log of task $task" >&2
        missing=1
      fi
    done
    exit "${missing:-0}"
  else
    [[ ${SLURM_JOB_ID:-} ]] || MEGAPROMPT_LOGIN_NODE=$(asked_for "$SCRIPT")
    export MEGAPROMPT_LOGIN_NODE
    for ((task = 0; task < count; task++)); do
      run_of "$task"
      if [[ $checked != *"|$check|"* ]]; then
        checked+="$check|"
        echo "== $check"
        "${PYTHON[@]}" -m megaprompt "${COMMAND:-probe}" "${options[@]}" "${all[@]}" --out "$out/check" --check
      fi
    done
    unset MEGAPROMPT_LOGIN_NODE
    submit_array "$count" "$@"
    echo "the table will be in $out/report.html"
  fi
}

for argument in "$@"; do
  if [[ $argument == -h || $argument == --help ]]; then usage "$0" 0; fi
done
SUBMITTED=("$@") # the arguments of the script, not of a function
PYTHON=(python3)
site=${MEGAPROMPT_SITE:-slurm/site.env}
# shellcheck source=/dev/null
if [[ -f $site ]]; then source "$site"; elif [[ -x .venv/bin/python ]]; then PYTHON=(.venv/bin/python); fi
