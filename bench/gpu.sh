#!/usr/bin/env bash
# Everything there is to know about this checkout on a GPU, in two commands of at most nine minutes each:
#
#     bench/gpu.sh OUTDIR [--cpu]
#     bench/gpu.sh OUTDIR --pipeline [--cpu]
#
# The first builds the extension in place, then doctor, the kernel tests compiled, ahead-of-time compilation, compute-sanitizer,
# tiles of the exponential kernel (bench/tune.py) and the loss benchmark. The second measures the rest: contrastive sampling, a
# training step beside its peers and `synpo plan`, decoding. Needs no network and no
# installed synpo; the second needs PyAV, as synpo does. A part that fails or runs out of time is recorded, what it had found
# included, and the rest goes on; the exit code tells at the end. OUTDIR gets seven files at most: status.json and logs.txt, written
# anew after every part; tune.json, loss.{json,png} and, where time is left, sweep.{json,png} (ours.* instead where a peer brought
# the benchmark down); or contrast.json, step.json, decode.json. Give each command an OUTDIR of its own.
#
#   --cpu          rehearse the script on a machine without a GPU: same parts, a few tests and kernels, tiny shapes
#   CAPTIONER      folder of the demo's captioner, for decoding (demo-out/captioner, else a random model)
#   PYTHON         interpreter with torch (.venv/bin/python, else python3)
#   GPU_BUDGET     seconds in all (540)
#   PARTS          run these alone, as "build loss sweep" (facts build doctor aot tests kernels memcheck racecheck tune loss sweep;
#                  with --pipeline: facts contrast step decode)
#   SYNPO_COMMIT   what to record as the commit where the history is not at hand
set -u
USAGE="usage: bench/gpu.sh OUTDIR [--pipeline] [--cpu]"
OUT=${1:?$USAGE}
shift
MODE=gpu PHASE=loss
for option; do
    case $option in
        --cpu) MODE=cpu ;;
        --pipeline) PHASE=pipeline ;;
        *)
            echo "$USAGE" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
ROOT=$PWD
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=$(command -v python3); fi
fi
export PYTHONPATH="$ROOT:$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
BUDGET=${GPU_BUDGET:-540}
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
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|liger|cut-cross|trl|numpy|pytest|hypothesis)'
    if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
}
export PYTHON
export -f facts

find_sanitizer() {
    command -v compute-sanitizer ||
        ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1
}

finish() {
    rm -f "$OUT"/*.part "$OUT"/*.part.png "$OUT"/{loss,sweep,ours,step}.csv # the JSON holds what the CSV does
    echo
    column -t -s $'\t' "$WORK/parts" 2>/dev/null || cat "$WORK/parts"
    FAILED=$(awk -F'\t' '$2 != "0" && $2 != "skipped" { printf " %s", $1 }' "$WORK/parts")
    if [ -n "$FAILED" ]; then
        echo "failed:$FAILED (after $SECONDS s; see logs.txt)"
        exit 1
    fi
    echo "all parts passed in $SECONDS s"
    exit 0
}

if [ "$PHASE" = pipeline ]; then
    CAPTIONER=${CAPTIONER:-demo-out/captioner}
    MODEL=()
    if [ -d "$CAPTIONER" ]; then MODEL=(--model "$CAPTIONER"); fi
    if [ "$MODE" = cpu ]; then
        export CUDA_VISIBLE_DEVICES=
        CONTRAST=(--device cpu --shapes 2x500 --seconds 1)
        STEP=(--device cpu --hidden 64 --layers 1 --vocab 512 --prompt 24 --answer 5 --time-budget 2)
        DECODE=(--device cpu --rows 2 --answers 2 --tokens 6 --seconds 0.1 --skip-long)
    else
        CONTRAST=(--device cuda --seconds 6)
        STEP=(--device cuda --time-budget 45)
        DECODE=(--device cuda --seconds 8)
    fi
    part facts 40 bash -c facts
    SHOW=60 part contrast 150 "$PYTHON" -m bench.contrast "${CONTRAST[@]}" --json "$OUT/contrast.json"
    SHOW=10 part step 160 "$PYTHON" -m bench.step "${STEP[@]}" --out "$OUT/step"
    SHOW=60 part decode "$(($(left) - 5))" "$PYTHON" -m bench.decode "${DECODE[@]}" "${MODEL[@]}" --json "$OUT/decode.json"
    finish
fi

PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)
if [ "$MODE" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    TESTS=(tests/kernels/test_choice.py tests/kernels/test_losses.py)
    AOT=(--arch 90 --only "exp bf16")
    TUNE=(env TRITON_INTERPRET=1 "$PYTHON" -m bench.tune --device cpu --seconds 2)
    LOSS=(--device cpu --smoke)
    REST=(--device cpu --shapes 64x512x32:float32 --head frozen)
else
    # what runs on the GPU first: what has not begun when the time for tests is spent is skipped
    TESTS=(tests/kernels/test_{triton_kernels,linear_logprobs,contrast_triton,trained_pairs,pair_loss,low_memory}.py)
    for file in tests/kernels/test_*.py; do
        [[ " ${TESTS[*]} " == *" $file "* ]] || TESTS+=("$file")
    done
    TESTS+=(--deselect tests/kernels/test_aot.py::test_every_kernel_compiles_for_every_chip)
    AOT=(--jobs 4)
    CHIP=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_capability()[0] * 10)' 2>/dev/null)
    case $CHIP in 80 | 90 | 100) AOT+=(--arch "$CHIP") ;; esac # the tests compile for all of them, on any machine
    TUNE=("$PYTHON" -m bench.tune --seconds 20)
    LOSS=(--device cuda --shapes gpu)
    REST=(--device cuda --shapes gpu-sweep gpu-formats --head frozen --providers synpo naive cce liger trl)
    if has xdist; then PYTEST+=(-n 8 --maxschedchunk 4); fi # small parts: some tests compile for half a minute
    if has pytest_timeout; then PYTEST+=(--timeout 90); fi
fi

part facts 40 bash -c facts
# in place: nothing is installed or downloaded; the same compile an editable install does
part build 120 env SYNPO_REQUIRE_EXT=1 "$PYTHON" setup.py -q build_ext --inplace --build-temp "$WORK/build"

# What is not timed runs side by side.
SHOW=40 part doctor 60 "$PYTHON" -c 'from synpo.doctor import report; report()' &
part aot 120 "$PYTHON" -m synpo_kernels.aot "${AOT[@]}" &
SHOW=12 part tests 200 env OMP_NUM_THREADS=1 SYNPO_TEST_SECONDS=150 "${PYTEST[@]}" "${TESTS[@]}" &
if [ "$MODE" = cpu ]; then
    for name in kernels memcheck racecheck; do skip "$name" "no GPU in this rehearsal"; done
else
    part kernels 80 "$PYTHON" -m bench.sanitize --jobs 4 --seconds 50 # compiles what the sanitizer then watches
    SANITIZER=$(find_sanitizer)
    if [ -n "$SANITIZER" ]; then
        WATCHED=(--error-exitcode 9 "$PYTHON" -m bench.sanitize --seconds 75)
        part memcheck 120 "$SANITIZER" --tool memcheck --report-api-errors no "${WATCHED[@]}" &
        part racecheck 120 "$SANITIZER" --tool racecheck "${WATCHED[@]}" &
    else
        for name in memcheck racecheck; do skip "$name" "compute-sanitizer was not found"; done
    fi
fi
wait

SHOW=60 part tune 75 "${TUNE[@]}" --out "$OUT/tune.json"

# A figure is written when its case is done, so that a benchmark cut short keeps what it has.
SPARE=$(($(left) - 30))
SHOW=90 part loss "$SPARE" "$PYTHON" -m bench.loss "${LOSS[@]}" --time-budget $((SPARE - 20)) --out "$OUT/loss"
CODE=$?
if [ "$CODE" -eq 3 ]; then
    SPARE=$(($(left) - 10))
    SHOW=60 part ours "$SPARE" "$PYTHON" -m bench.loss "${LOSS[@]}" --providers synpo naive --time-budget $((SPARE - 15)) --out "$OUT/ours"
elif [ "$(left)" -gt 45 ]; then
    SPARE=$(($(left) - 10))
    SHOW=90 part sweep "$SPARE" "$PYTHON" -m bench.loss "${REST[@]}" --time-budget $((SPARE - 15)) --out "$OUT/sweep"
fi

finish
