#!/usr/bin/env bash
# Everything that must be known from a first GPU, in one command of at most 25 minutes, without a network. Started again, it
# goes on with what is not done yet. Needs what requirements.txt lists, and pytest for the first part.
#
#     benchmarks/gpu.sh [FOLDER]              results, logs and runs go there (default: runs/gpu)
#     LIMIT=570 benchmarks/gpu.sh             seconds that this call may take (default: 1500)
#     SMOKE=1 benchmarks/gpu.sh /tmp/smoke    the same with tiny sizes, on any machine: does everything start?
set -u
cd "$(dirname "$0")/.." || exit
out=${1:-runs/gpu} limit=${LIMIT:-1500} python=${PYTHON:-python}
mkdir -p "$out"
export MUJOCO_GL=disable OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
reserve=$((limit / 5)) # for the runs at the end
scales=(1 5 3) speed=("$python" benchmarks/speed.py --csv "$out/speed.csv")
together=(--scripts mst_mrq --scales 1 --modes eager graphs --processes 1 2 4 8)
run=("$python" mst_mrq.py --env dog-run --runs-dir "$out/runs")
if [ -n "${SMOKE:-}" ]; then
    reserve=0 scales=(0.05) speed+=(--rounds 2 --repeat 1 --period 5)
    together=(--scripts mst_mrq --scales 0.05 --modes eager graphs --processes 1 2)
    run+=(--width-scale 0.05 --batch-size 16 --buffer-size 1000 --learning-starts 200 --total-timesteps 300)
    run+=(--eval-interval 100 --eval-episodes 1 --target-network-frequency 50)
fi

# part NAME SECONDS COMMAND...: runs it once; it ends while so many seconds are left
part() {
    local name=$1 left=$((limit - SECONDS - $2)) code
    shift 2
    [ -e "$out/$name.done" ] && return
    if [ "$left" -lt 10 ]; then
        echo "$name: no time left, start the same command again"
        return
    fi
    echo "$name: at most $left s, log in $out/$name.log"
    timeout --foreground --kill-after=30 "$left" "$@" >"$out/$name.log" 2>&1
    code=$?
    case $code in
    75 | 124) echo "$name: stopped, start the same command again to go on" ;;
    *) echo "$code" >"$out/$name.done" ;;
    esac
    [ "$code" -eq 0 ] || [ ! -e "$out/$name.done" ] ||
        echo "$name: FAILED with code $code, see its log; delete $out/$name.done to try it again"
}

part tests "$reserve" "$python" -m pytest tests/test_graphs.py -k cuda
for scale in "${scales[@]}"; do
    for script in mst_mrq mst_sac mst_ddpg mst_mrsac; do
        part "$script-$scale" "$reserve" "${speed[@]}" --scripts "$script" --scales "$scale"
    done
    part together "$reserve" "${speed[@]}" "${together[@]}"
done
[ "$(cat "$out/tests.done")" = 0 ] && run+=(--cuda-graphs) # only what has passed its tests
part run-mst 20 "${run[@]}" --exp-name mst &               # 20 s for the last checkpoint
part run-443 20 "${run[@]}" --exp-name 443 --encoder-arch 4 --critic-arch 4 --actor-arch 3 \
    --encoder-regime dense --critic-regime dense --actor-regime dense &
wait

printf '\ntests: %s\n' "$(tail -n 1 "$out/tests.log")"
for name in run-mst run-443; do
    echo "$name: $(grep -a ' return ' "$out/$name.log" | tail -n 1)"
done
"$python" benchmarks/speed.py --show "$out/speed.csv"
echo "$SECONDS s"
