#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
# Runs the commands of a file, one a line, K of them side by side, on this machine or as the tasks of a Slurm array:
#     printf 'python mst_mrq.py --env dog-run --seed %d\n' {1..8} >dog.txt
#     experiments/run.sh --jobs 2 dog.txt
#     sbatch --array=1-4 --gpus=1 --time=24:00:00 experiments/run.sh --jobs 2 dog.txt    # task i: the i-th two lines
# The output of a command goes to logs/NAME.log: NAME is what follows "# " in its line, or else the line. On USR1 and
# TERM a command has to save a checkpoint and end with 75, and to go on from it when it is started again. A task near
# its time limit requeues itself. After a command that ends with 2 (wrong flags) no other is started.
# Exit codes: 0 all are finished, 75 start the same again, 1 a command failed, 2 wrong usage, here or of a command.
set -u

usage() { echo "error: $1; usage: run.sh [--jobs K] FILE" >&2; exit 2; }

stop= # the signal that came: nothing is started after it
trap 'stop=TERM' TERM INT HUP QUIT # scancel, a preemption (then Slurm requeues by itself), Ctrl-C, a closed terminal
trap 'stop=${stop:-USR1}' USR1     # Slurm: the time limit is near
trap : PIPE                        # nobody reads the output any more

# The commands: all of the file, or those of this task
jobs=1 lines=()
[[ ${1-} == --jobs ]] && jobs=${2-} && shift 2
[[ $jobs =~ ^[1-9][0-9]{0,2}$ ]] || usage "--jobs '$jobs' is not a number from 1 to 999"
[[ $# == 1 && -r $1 && ! -d $1 ]] || usage "'$*' is not a file of commands"
while read -r line || [[ $line ]]; do
    [[ ! $line || $line == "#"* ]] || lines+=("$line")
done < <(tr -d '\r' <"$1")
task=${SLURM_ARRAY_TASK_ID:-1} count=${#lines[@]}
[[ $task =~ ^[1-9][0-9]{0,8}$ ]] || usage "there is no task $task: write --array=1-$(((count + jobs - 1) / jobs))"
(((task - 1) * jobs < count)) || usage "$1 has $count commands, none for task $task"
if [[ ${SLURM_ARRAY_TASK_ID-} ]]; then
    lines=("${lines[@]:(task - 1) * jobs:jobs}")
    [[ $task == "${SLURM_ARRAY_TASK_MAX-}" ]] && ((task * jobs < count)) &&
        echo "warning: $((count - task * jobs)) of $count commands are in no task of this array"
fi
for line in "${lines[@]}"; do # are they words alone? A function that nobody calls is parsed and not run
    [[ $line != *\\ ]] && eval "parsed() { words=($line"$'\n); }' 2>/dev/null || usage "not one plain command: $line"
done
mkdir -p logs 2>/dev/null || usage "no folder logs"

# Cores and GPUs: those that Slurm gives, else those of this machine
for cores in "${SLURM_CPUS_PER_TASK-}" "${SLURM_CPUS_ON_NODE-}" "$(nproc)" 1; do
    [[ $cores =~ ^[1-9][0-9]{0,5}$ ]] && break # Slurm may write 4(x2), or nothing
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))} PYTHONUNBUFFERED=1
if [[ ! ${CUDA_VISIBLE_DEVICES+set} && ! ${SLURM_JOB_ID-} ]] && list=$(nvidia-smi -L 2>/dev/null); then
    gpus=($(grep -o 'MIG-[^)]*' <<<"$list" || grep -o 'GPU-[^)]*' <<<"$list")) # the parts of divided GPUs, or whole ones
else
    IFS=', ' read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-}"
fi

pid=() log=() running=0 told= again= failed= wrong=
start() { # a command, in the first free slot
    local slot=0
    while [[ ${pid[slot]-} ]]; do slot=$((slot + 1)); done
    log[slot]=logs/$(LC_ALL=C tr -c '[:alnum:]._=+\n-' - <<<"${1##*# }" | sed -E 's/^(.{120}).+(.{120})$/\1-\2/').log
    echo "start: ${log[slot]}"
    (
        ((${#gpus[@]})) && export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
        echo "# $(date '+%F %T') on $HOSTNAME: $1"
        eval "words=($1"$'\n)' && exec env "${words[@]}"
    ) </dev/null >>"${log[slot]}" 2>&1 &
    pid[slot]=$! running=$((running + 1))
}

look() { # for a moment: pass a signal on, and see what has ended
    sleep 0.2 # what was started before a signal came can receive it now
    local slot code signal=$stop
    for slot in "${!pid[@]}"; do
        [[ ${pid[slot]} ]] || continue
        [[ $signal == "$told" ]] || kill "-$signal" "${pid[slot]}" 2>/dev/null
        kill -0 "${pid[slot]}" 2>/dev/null && continue
        wait "${pid[slot]}" && code=0 || code=$?
        [[ $stop ]] && ((code > 128)) && code=75 # it could not listen yet
        pid[slot]= running=$((running - 1))
        echo "exit code $code: ${log[slot]}"
        case $code in
            0) ;;
            75) again=75 ;;
            2 | 12[5-7]) wrong=2 ;; # wrong flags, or no such program
            *) failed=1 ;;
        esac
        ((code % 75)) && tail -n 2 "${log[slot]}"
        echo "# exit code $code" >>"${log[slot]}"
    done
    told=$signal
}

for line in "${lines[@]}"; do
    while ((running >= jobs)); do look; done
    [[ $stop || $wrong ]] && again=75 && break
    start "$line"
done
while ((running)); do look; done

if [[ $again && ! $wrong && $stop == USR1 && ${SLURM_JOB_ID-} ]]; then
    trap "" TERM # Slurm ends this script to requeue it. The SLURM_JOB_ID of a last task is that of the whole array
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "${wrong:-${again:-${failed:-0}}}"
