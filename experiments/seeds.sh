#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@300
# Seeds of one command, as a Slurm array (time, partition and so on are sbatch's flags) or on this machine:
#     sbatch --array=1-8 --time=24:00:00 --gpus=1 experiments/seeds.sh mst_mrq.py --env dog-run --scale 5
#     experiments/seeds.sh --jobs 2 --seeds 1-8 mst_mrq.py --env dog-run --scale 5
# The output of each seed is in logs/. The command has to take --seed, to save a checkpoint and end with code 75 on
# SIGUSR1 and SIGTERM, and to go on from there when it is started again; a task near its time limit requeues itself.
# Exit codes: 0 all are finished, 75 start the same line again, 1 one failed. PYTHON is the interpreter (python).
jobs=1 seeds=$SLURM_ARRAY_TASK_ID
while [[ $1 == --jobs || $1 == --seeds ]]; do declare "${1#--}=$2" && shift 2; done
[[ $seeds && $1 ]] || { echo "usage: ${0##*/} --jobs 2 --seeds 1-8 SCRIPT.py [FLAGS]" >&2; exit 2; }
threads=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / jobs))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))} PYTHONUNBUFFERED=1
log=logs/$(tr -cs '[:alnum:]._=\n' - <<<"$*" | cut -c -200) again= failed= stop= cancelled=
declare -A seed_of && mkdir -p logs # seed_of: by process id
trap 'stop=USR1; kill -USR1 "${!seed_of[@]}"' USR1 # Slurm's warning of the time limit
trap 'stop=TERM cancelled=yes; kill "${!seed_of[@]}"' TERM INT # scancel, or a preemption: Slurm requeues by itself
reap() {
    sleep 0.5
    for pid in "${!seed_of[@]}"; do
        kill -0 "$pid" 2>/dev/null && continue
        wait "$pid" && code=0 || code=$?
        echo "seed ${seed_of[$pid]} ended with $code"
        unset "seed_of[$pid]"
        if ((code == 75)) || [[ $stop && $code -gt 128 ]]; then again=75; elif ((code)); then failed=1; fi
    done
}
for seed in $(for part in ${seeds//,/ }; do seq "${part%-*}" "${part#*-}"; done); do
    while ((${#seed_of[@]} >= jobs)); do reap; done
    [[ $stop ]] && again=75 && break
    "${PYTHON:-python}" "$@" --seed "$seed" >>"$log-seed-$seed.log" 2>&1 & seed_of[$!]=$seed
    echo "seed $seed: $log-seed-$seed.log"
    [[ $stop ]] && kill "-$stop" "$!" # it came in between
done
while ((${#seed_of[@]})); do reap; done
task=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} # JOB_ID may be the array's id
[[ $again && $stop && ! $cancelled && $task ]] && trap "" TERM && scontrol requeue "$task" # which ends this script
exit "${again:-${failed:-0}}"
