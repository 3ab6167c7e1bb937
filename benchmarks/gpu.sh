#!/usr/bin/env bash
# What must be known from a first GPU, in eight minutes and without a network, as one table. The most important comes first;
# started again, it goes on with what is not done yet. Needs what requirements.txt lists, and pytest for the tests.
#
#     benchmarks/gpu.sh [FOLDER]              results, logs and runs go there (default: runs/gpu)
#     LIMIT=900 benchmarks/gpu.sh             seconds that this call may take (default: 480)
#     WHEELS=wheels benchmarks/gpu.sh         first installs the wheels of this folder into FOLDER/site
#     SMOKE=1 benchmarks/gpu.sh /tmp/smoke    the same with tiny sizes, on any machine: does everything start?
set -u
wheels=${WHEELS:+$(realpath "$WHEELS")} out=$(realpath -m "${1:-runs/gpu}") limit=${LIMIT:-480} python=${PYTHON:-python3}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit
export MUJOCO_GL=disable OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 7) / 8))} # for 8 processes at once
if [ -n "$wheels" ]; then
    export PYTHONPATH=$out/site
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$wheels"/*.whl || exit
fi
scales=(1 5 3) large=w4d3 processes=(1 2 4 8) speed=("$python" benchmarks/speed.py --csv "$out/speed.csv")
run=("$python" mst_mrq.py --env dog-run --runs-dir "$out/runs" --learning-starts 1000 --eval-interval 1000)
if [ -n "${SMOKE:-}" ]; then
    scales=(0.05 0.05 0.05) large=w0.05d2 processes=(1 2) speed+=(--rounds 2 --repeat 1 --period 5)
    run+=(--width-scale 0.05 --batch-size 16 --buffer-size 2000 --total-timesteps 1100 --eval-episodes 1)
fi

# part NAME COMMAND...: runs it once, ended where the time does. The last tenth is left to what ends by itself
part() {
    local name=$1 left=$((limit * 9 / 10 - SECONDS)) code=0
    [ ! -e "$out/$name.done" ] || return 0
    [ "$left" -ge 10 ] || { echo "$name: no time left, start the same command again" && return; }
    timeout --foreground --kill-after=20 "$left" "${@:2}" >"$out/$name.log" 2>&1 || code=$?
    case $code in
    0) echo "$name: done after $SECONDS s" && touch "$out/$name.done" ;;
    75 | 124) echo "$name: stopped, start the same command again to go on" ;;
    *) echo "$name: FAILED with code $code, see $out/$name.log; the same command tries it again" ;;
    esac
}

# measure SCALE MODES SCRIPT...
measure() {
    for script in "${@:3}"; do
        part "$script-$1-${2// /-}" "${speed[@]}" --scripts "$script" --scales "$1" --modes $2
    done
}

graphs='eager graphs' compile='compile compile+graphs'
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { graphs=eager && compile=compile; }
part tests "$python" -m pytest tests/test_graphs.py -k cuda
measure "${scales[0]}" "$graphs" mst_mrq mst_sac
measure "${scales[1]}" "$graphs" mst_mrq mst_sac
measure "$large" "$graphs" mst_sac # the paper's largest, for its memory
part together "${speed[@]}" --scripts mst_mrq --scales "${scales[0]}" --modes $graphs --processes "${processes[@]}"
measure "${scales[0]}" "$compile" mst_mrq mst_sac
measure "${scales[0]}" "$graphs" mst_ddpg mst_mrsac
measure "${scales[1]}" "$graphs" mst_ddpg mst_mrsac
measure "${scales[2]}" "$graphs" mst_mrq mst_sac mst_ddpg mst_mrsac
part run-eager "${run[@]}" --exp-name eager &
[ ! -e "$out/tests.done" ] || part run-graphs "${run[@]}" --exp-name graphs --cuda-graphs
wait
tail -vn 1 "$out/tests.log" "$out"/runs/*/eval.csv 2>/dev/null
"$python" benchmarks/speed.py --show "$out/speed.csv" && echo "$SECONDS s"
