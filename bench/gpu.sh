#!/usr/bin/env bash
# Everything there is to know about this checkout on a GPU, in calls of less than four minutes, the most telling first:
#
#     bench/gpu.sh OUTDIR loss          every path against float64; ours in every mode beside the products and the compiled naive loss
#                                       at the three headline shapes; the kernels of one pass, one by one
#     bench/gpu.sh OUTDIR tests         the tests of the kernels, compiled, on all cores
#     bench/gpu.sh OUTDIR pipeline      a training step, decoding, sampling
#     bench/gpu.sh OUTDIR peers         the loss beside everybody else's; other sizes and formats
#     bench/gpu.sh OUTDIR checks        tiles of the exponential kernel; memcheck, racecheck; registers and spills
#
# Each builds the extension in place where that is not yet done, beside what times nothing. Needs no network and no installed synpo,
# but PyAV as synpo does. A part that fails or runs out of time is recorded, what it had found included, and the rest goes on; the exit
# code tells at the end. OUTDIR/CALL gets status.json and logs.txt, written anew after every part, and a JSON for each benchmark,
# written anew after every row or table.
#
#   --cpu          rehearse the script on a machine without a GPU: same parts, a few tests and kernels, tiny shapes
#   CAPTIONER      folder of the demo's captioner, for decoding (demo-out/captioner, else a random model)
#   PYTHON         interpreter with torch (.venv/bin/python, else python3)
#   GPU_BUDGET     seconds in all (210)
#   PARTS          run these alone, as "build loss"
#   SYNPO_COMMIT   what to record as the commit where the history is not at hand
set -u
USAGE="usage: bench/gpu.sh OUTDIR loss|tests|pipeline|peers|checks [--cpu]"
OUT=${1:?$USAGE}
CALL=${2:-}
MODE=gpu
case ${3:-} in
    --cpu) MODE=cpu ;;
    ?*) CALL= ;;
esac
case $CALL in
    loss | tests | pipeline | peers | checks) ;;
    *)
        echo "$USAGE" >&2
        exit 2
        ;;
esac
mkdir -p "$OUT/$CALL" && OUT=$(cd "$OUT/$CALL" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
ROOT=$PWD
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=$(command -v python3); fi
fi
export PYTHONPATH="$ROOT:$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
BUDGET=${GPU_BUDGET:-210}
CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 4)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SECONDS=0
left() { echo $((BUDGET - SECONDS)); }

# record NAME CODE SECONDS: note a part that has ended, and write status.json and logs.txt with all that have
record() {
    local name code took
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$WORK/parts"
    while IFS=$'\t' read -r name code took; do
        printf '%s\n===== %s: exit code %s, %s s\n' "" "$name" "$code" "$took"
        cat "$WORK/$name.log"
    done <"$WORK/parts" >"$WORK/logs-$1" && mv "$WORK/logs-$1" "$OUT/logs.txt"
    awk -F'\t' 'BEGIN { print "{\"parts\": [" }
        { printf "%s {\"name\": \"%s\", \"exit\": \"%s\", \"seconds\": %s}", (NR > 1 ? ",\n" : ""), $1, $2, $3 }
        END { print "\n]}" }' "$WORK/parts" >"$WORK/status-$1" && mv "$WORK/status-$1" "$OUT/status.json"
}

# part NAME LIMIT COMMAND...: run within LIMIT seconds and what is left, log and record
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    if [ -n "${PARTS:-}" ] && ! [[ " $PARTS " == *" $name "* ]]; then
        skip "$name" "not among PARTS"
        return 1
    fi
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -le 0 ]; then
        skip "$name" "the budget of $BUDGET s was spent"
        return 1
    fi
    echo "== $name: started, at most $limit s"
    timeout -k 5 "$limit" "$@" >"$WORK/$name.log" 2>&1
    code=$?
    record "$name" "$code" $((SECONDS - start))
    printf '== %s: exit code %s, %s s\n%s\n' "$name" "$code" $((SECONDS - start)) \
        "$(tail -n "${SHOW:-3}" "$WORK/$name.log" | cut -c1-180)"
    return "$code"
}

skip() {
    echo "$2" >"$WORK/$1.log"
    record "$1" skipped 0
    echo "== $1: skipped, $2"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

facts() {
    uname -a
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|liger|cut-cross|quack|trl|numpy|pytest|hypothesis)'
    if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
}
export PYTHON
export -f facts

# In place: nothing is installed or downloaded; the same compile an editable install does. Begun here, waited for with `wait`.
build() {
    part facts 40 bash -c facts &
    if "$PYTHON" -c 'from synpo_kernels import _ext; raise SystemExit(not _ext.available())' >/dev/null 2>&1; then
        skip build "the extension of these sources is there"
        return
    fi
    part build 120 env SYNPO_REQUIRE_EXT=1 "$PYTHON" setup.py -q build_ext --inplace --build-temp "$WORK/build" &
}

find_sanitizer() {
    command -v compute-sanitizer ||
        ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1
}

# loss NAME SECONDS OPTIONS...: the benchmark of the loss, which is told to end ten seconds before it is made to
loss() {
    local name=$1 limit=$2
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    SHOW=90 part "$name" "$limit" "$PYTHON" -m bench.loss --device "$DEVICE" "$@" --time-budget $((limit - 10)) --out "$OUT/$name"
}

if [ "$MODE" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    DEVICE=cpu
else
    DEVICE=cuda
fi

call_loss() {
    local shapes=(--shapes gpu)
    [ "$MODE" = cpu ] && shapes=(--smoke)
    build
    SHOW=4 part smoke 60 "$PYTHON" -m bench.sanitize --device "$DEVICE" --jobs "$((CORES < 12 ? CORES : 12))" --seconds 45
    wait
    loss loss $(($(left) - 30)) "${shapes[@]}" --providers synpo "naive compiled"
    SHOW=60 part kernels "$(left)" "$PYTHON" -m bench.kernels --device "$DEVICE" --out "$OUT/kernels.json"
}

call_tests() {
    local pytest=("$PYTHON" -m pytest -q -p no:cacheprovider) tests file
    if [ "$MODE" = cpu ]; then
        tests=(tests/kernels/test_choice.py tests/kernels/test_losses.py)
    else
        # what runs on the GPU first: what has not begun when the time for tests is spent is skipped
        tests=(tests/kernels/test_{triton_kernels,linear_logprobs,contrast_triton,trained_pairs,pair_loss}.py)
        for file in tests/kernels/test_*.py; do
            [[ " ${tests[*]} " == *" $file "* ]] || tests+=("$file")
        done
        tests+=(--deselect tests/kernels/test_aot.py::test_every_kernel_compiles_for_every_chip)
        if has xdist; then pytest+=(-n "$CORES" --maxschedchunk 4); fi # small parts: some tests compile for half a minute
        if has pytest_timeout; then pytest+=(--timeout 90); fi
    fi
    build
    wait
    SHOW=40 part doctor 30 "$PYTHON" -c 'from synpo.doctor import report; report()' &
    SHOW=12 part tests "$(($(left) - 5))" env OMP_NUM_THREADS=1 SYNPO_TEST_SECONDS="$(($(left) - 40))" "${pytest[@]}" "${tests[@]}"
    wait
}

call_pipeline() {
    local model=() contrast step decode
    CAPTIONER=${CAPTIONER:-demo-out/captioner}
    if [ -d "$CAPTIONER" ]; then model=(--model "$CAPTIONER"); fi
    if [ "$MODE" = cpu ]; then
        contrast=(--shapes 2x500 --seconds 1)
        step=(--hidden 64 --layers 1 --vocab 512 --prompt 24 --answer 5 --time-budget 2)
        decode=(--rows 2 --views 2 --answers 1 --tokens 6 --seconds 0.1 --skip-long)
    else
        contrast=(--shapes 8x152064 64x152064 8x32000 64x32000 --seconds 3)
        step=(--time-budget 40)
        decode=(--rows 8 64 1 --seconds 6)
    fi
    build
    wait
    SHOW=10 part step 90 "$PYTHON" -m bench.step --device "$DEVICE" "${step[@]}" --out "$OUT/step"
    SHOW=60 part contrast 60 "$PYTHON" -m bench.contrast --device "$DEVICE" "${contrast[@]}" --json "$OUT/contrast.json"
    SHOW=60 part decode "$(left)" "$PYTHON" -m bench.decode --device "$DEVICE" "${decode[@]}" "${model[@]}" --json "$OUT/decode.json"
}

call_peers() {
    local shapes=(--shapes gpu) rest=(--shapes gpu-sweep gpu-formats --head frozen)
    [ "$MODE" = cpu ] && shapes=(--smoke) rest=(--shapes 64x512x32:float32 --head frozen)
    build
    wait
    loss peers $(($(left) * 2 / 3)) "${shapes[@]}"
    # a peer may bring down the process, which exits with 3: those that compile nothing of their own are then measured alone
    if [ $? -eq 3 ]; then loss ours $(($(left) / 2)) "${shapes[@]}" --providers synpo naive trl; fi
    [ "$(left)" -gt 30 ] && loss sweep "$(left)" "${rest[@]}" --providers synpo naive cce "liger fused" trl
}

call_checks() {
    local aot=(--jobs 4) tune=("$PYTHON" -m bench.tune --seconds 20) chip sanitizer watched name
    if [ "$MODE" = cpu ]; then
        aot=(--arch 90 --only "exp described bf16")
        tune=(env TRITON_INTERPRET=1 "$PYTHON" -m bench.tune --device cpu --seconds 2)
    else
        chip=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_capability()[0] * 10)' 2>/dev/null)
        case $chip in 80 | 90 | 100) aot+=(--arch "$chip") ;; esac # the tests compile for all of them, on any machine
    fi
    build
    wait
    SHOW=60 part tune 75 "${tune[@]}" --out "$OUT/tune.json"
    part aot 120 "$PYTHON" -m synpo_kernels.aot "${aot[@]}" &
    sanitizer=$(find_sanitizer)
    if [ "$MODE" = gpu ] && [ -n "$sanitizer" ]; then
        # compiled first by several processes: the sanitizer then watches running alone
        part kernels 60 "$PYTHON" -m bench.sanitize --backends triton --jobs "$((CORES < 12 ? CORES : 12))" --seconds 45
        watched=(--error-exitcode 9 "$PYTHON" -m bench.sanitize --backends triton --seconds 60)
        part memcheck 120 "$sanitizer" --tool memcheck --report-api-errors no "${watched[@]}" &
        part racecheck 120 "$sanitizer" --tool racecheck "${watched[@]}" &
    else
        for name in kernels memcheck racecheck; do skip "$name" "compute-sanitizer was not found, or there is no GPU"; done
    fi
    wait
}

"call_$CALL"
rm -f "$OUT"/*.part "$OUT"/*.part.png "$OUT"/*.csv # the JSON holds what the CSV does
echo
column -t -s $'\t' "$WORK/parts" 2>/dev/null || cat "$WORK/parts"
FAILED=$(awk -F'\t' '$2 != "0" && $2 != "skipped" { printf " %s", $1 }' "$WORK/parts")
if [ -n "$FAILED" ]; then
    echo "failed:$FAILED (after $SECONDS s; see logs.txt)"
    exit 1
fi
echo "all parts passed in $SECONDS s"
