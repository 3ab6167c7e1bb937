#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# A task of a Slurm array. `python -m experiments submit` starts it; by hand, from the root of the repository:
#     sbatch --array=0-95 experiments/array.sh PYTHON OFFSET FIGURE [--runs-per-task K ...]
# The task number is OFFSET plus the array index. Partition, account and so on come from sbatch's flags or SBATCH_*.

python=$1 offset=$2
shift 2

# USR1 is Slurm's warning of the time limit. TERM is scancel, or a preemption, after which Slurm requeues by itself.
warned= cancelled=
trap 'warned=yes; kill -USR1 "$!"' USR1
trap 'cancelled=yes; kill -TERM "$!"' TERM

"$python" -m experiments task --index "$((offset + SLURM_ARRAY_TASK_ID))" "$@" &
child=$!
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # a signal ends `wait`, not the child
done
[ "$code" -le 128 ] || { wait "$child"; code=$?; } # the child's own code, if it ended just as the signal ended `wait`

# 138: it ended by USR1 itself, before it could listen
if [ "$warned" ] && [ ! "$cancelled" ] && { [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; }; then
    echo "the time limit is near: requeued"
    trap "" TERM # Slurm ends this script to requeue it
    # SLURM_JOB_ID would not do: in the last task of an array it is the id of the whole array
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
