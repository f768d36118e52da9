#!/bin/bash
# What results/ needs a GPU for, from nothing, at one commit: the perplexity table, the tasks' models and packages, the summaries.
#
#   bash benchmarks/tables.sh MINILM DATA OUT [DEVICE]      what is kept in OUT is not done again; OUT/results has the perplexity table
#
# MINILM: the encoder's folder; DATA: books, wikitext2, cnndm and a folder for each task; DEVICE: whose table has the rows of MiniLM with
# the heads that `finetune.py --epochs 0` draws. Its packages are then measured on it, and the reports written: results/README.md.
# WORKERS, ON: jobs at a time, and where. Their seconds are of so many at once; MPS=1 lets them share the GPU (NVIDIA's multi-process service).
# AT_ONCE=1: GLUE's jobs do not wait for the perplexity table (four GPUs and 64 cores: WORKERS=16 THREADS=3). THREADS: sentences that a job
# of GLUE scores a package on at a time; SQuAD's take one more.
# SEEDS, STEPS, TASK_STEPS, EPOCHS, PROFILES: less of it, to see that it runs, or another device's table.
set -eu
MINILM=$1 DATA=$2 OUT=$3 DEVICE=${4:-epyc-zen5-2}
HERE=$(cd "$(dirname "$0")" && pwd)
WORKERS=${WORKERS:-12} ON=${ON:-cuda} SEEDS=${SEEDS:-3} STEPS=${STEPS:-400} TASK_STEPS=${TASK_STEPS:-120} EPOCHS=${EPOCHS:-4} THREADS=${THREADS:-1}
PROFILES=${PROFILES:-$HERE/../profiles} PRECISION=bf16
if [ "$ON" = cpu ]; then PRECISION=fp32; fi
TEXT=(--text "$DATA/books/train.txt.xz" --heldout "$DATA/books/heldout.txt" --also "$DATA/wikitext2/valid.txt" --seeds "$SEEDS" --on "$ON")
TRAINED=(--steps "$TASK_STEPS" --seeds "$SEEDS" --on "$ON" --precision "$PRECISION" --device "$DEVICE" --profiles "$PROFILES")
TRAINED+=(--models "$OUT/models" --data "$DATA")
WRITTEN=(--articles "$DATA/cnndm/test.jsonl" --out "$OUT/summaries" --heldout "${ARTICLES:-60}" --threads 4 --on "$ON")
FITTED=(--data "$DATA" --out "$OUT/models" --seeds "$SEEDS" --epochs "$EPOCHS" --on "$ON")
# Asked now, not when a job comes to it a quarter of an hour later.
for module in onnxruntime_genai optimum.exporters.onnx rouge_score; do
    why=$(python -c "import $module" 2>&1) || {
        echo "expected a Python that imports $module, got: ${why##*$'\n'}; type: pip install 'bittailor[train,summaries]'" >&2
        exit 2
    }
done
mkdir -p "$OUT/logs"
if [ "${MPS:-}" ]; then nvidia-cuda-mps-control -d || true; fi
set -m # a job's process group is its own: ending that ends all that the job has started, which would hold the GPU
groups=()
trap 'for group in "${groups[@]}"; do kill -- "-$group" || true; done 2>/dev/null' EXIT
trap 'exit 143' TERM # which bash hears while it waits for a job, not while one runs before it: `held`

of() { # NAME COMMAND...: a benchmark, its output in a log of its own
    local name=$1
    shift
    echo "$(date +%T) $name" >&2
    python "$HERE/$1" "${@:2}" >"$OUT/logs/$name.log" 2>&1 || {
        echo "$name failed, see $OUT/logs/$name.log" >&2
        return 1
    }
}

held() { # COMMAND...: a job to wait for
    "$@" &
    groups+=("$!")
    wait "$!"
}

graph() { # TASK: what a device is profiled with
    of "head-$1" finetune.py "$MINILM" --data "$DATA" --out "$OUT/heads" --tasks "$1" --seeds 1 --epochs 0 --on "$ON"
    if [ ! -f "$OUT/graph-$1/graph.json" ]; then
        mkdir -p "$OUT/graph-$1"
        python -c "from pathlib import Path; from toolchain.graph.build import build; build('$OUT/heads/$1-0', Path('$OUT/graph-$1'))"
    fi
}

fitted() { # what GLUE's jobs begin with
    local task job running=()
    for task in sst2 cola mrpc stsb; do
        of "finetune-$task" finetune.py "$MINILM" "${FITTED[@]}" --tasks "$task" &
        running+=($!)
    done
    graph sst2
    for job in "${running[@]}"; do wait "$job"; done
}

tasks() { # HEAD NAME WORKERS THREADS EXAMPLES TASK...
    of "$2" tasks_at_budget.py run --graph "$OUT/graph-$1" --out "$OUT/$2" "${TRAINED[@]}" --workers "$3" --threads "$4" --examples "$5" --tasks "${@:6}"
}

questions() { # the longest of all: it begins as soon as it can
    of finetune-squad finetune.py "$MINILM" "${FITTED[@]}" --tasks squad
    graph squad
    tasks squad squad 3 $((THREADS + 1)) 600 squad
}

glue() {
    tasks sst2 glue "$WORKERS" "$THREADS" 1000 sst2 cola mrpc stsb
}

of post_training post_training.py run "${TEXT[@]}" --out "$OUT/cells" &
cells=$!
if [ "${AT_ONCE:-}" ]; then
    { fitted; glue; } &
else
    fitted &
fi
models=$!
questions &
questions=$!
groups+=("$cells" "$models" "$questions")
TEXT+=(--out "$OUT/text" --steps "$STEPS" --precision "$PRECISION" --results "$OUT/results")
held of perplexity perplexity_at_bits.py "${TEXT[@]}" --workers "$WORKERS"
wait "$cells"
of perplexity-report perplexity_at_bits.py "${TEXT[@]}" --report --post-training "$OUT/cells/cells.json"
running=("$questions")
if [ "${AT_ONCE:-}" ]; then
    running+=("$models")
else
    wait "$models"
    held glue
fi
for ((seed = 0; seed < SEEDS; seed++)); do
    OMP_NUM_THREADS=4 of "summaries-$seed" summaries.py run "${WRITTEN[@]}" --seeds "$seed" &
    running+=($!) groups+=($!)
done
for job in "${running[@]}"; do wait "$job"; done
