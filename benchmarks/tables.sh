#!/bin/bash
# What results/ needs a GPU for, from nothing, at one commit: the perplexity table, the tasks' models and packages, the summaries.
#
#   bash benchmarks/tables.sh MINILM DATA OUT [DEVICE]      what is kept in OUT is not done again; OUT/results has the perplexity table
#
# MINILM: the encoder's folder; DATA: books, wikitext2, cnndm and a folder for each task; DEVICE: whose table has the rows of MiniLM with
# the heads that `finetune.py --epochs 0` draws. Its packages are then measured on it, and the reports written: results/README.md.
# WORKERS, ON: jobs at a time, and where. Their seconds are of so many at once; MPS=1 lets them share the GPU (NVIDIA's multi-process service).
set -eu
MINILM=$1 DATA=$2 OUT=$3 DEVICE=${4:-epyc-avx512-2}
WORKERS=${WORKERS:-12} ON=${ON:-cuda}
HERE=$(cd "$(dirname "$0")" && pwd)
TEXT=(--text "$DATA/books/train.txt.xz" --heldout "$DATA/books/heldout.txt" --also "$DATA/wikitext2/valid.txt" --seeds 3 --on "$ON")
TRAINED=(--steps 120 --on "$ON" --precision bf16 --device "$DEVICE" --profiles "$HERE/../profiles" --models "$OUT/models" --data "$DATA")
mkdir -p "$OUT/logs"
if [ "${MPS:-}" ]; then nvidia-cuda-mps-control -d || true; fi
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT

of() { # NAME COMMAND...: a benchmark, its output in a log of its own
    local name=$1
    shift
    echo "$(date +%T) $name" >&2
    python "$HERE/$1" "${@:2}" >"$OUT/logs/$name.log" 2>&1 || {
        echo "$name failed, see $OUT/logs/$name.log" >&2
        return 1
    }
}

graph() { # TASK: what a device is profiled with
    of "head-$1" finetune.py "$MINILM" --data "$DATA" --out "$OUT/heads" --tasks "$1" --seeds 1 --epochs 0 --on "$ON"
    if [ ! -f "$OUT/graph-$1/graph.json" ]; then
        mkdir -p "$OUT/graph-$1"
        python -c "from pathlib import Path; from toolchain.graph.build import build; build('$OUT/heads/$1-0', Path('$OUT/graph-$1'))"
    fi
}

tasks() { # HEAD NAME WORKERS THREADS EXAMPLES TASK...
    of "$2" tasks_at_budget.py run --graph "$OUT/graph-$1" --out "$OUT/$2" "${TRAINED[@]}" --workers "$3" --threads "$4" --examples "$5" --tasks "${@:6}"
}

questions() { # the longest of all: it begins as soon as it can
    of finetune-squad finetune.py "$MINILM" --data "$DATA" --out "$OUT/models" --tasks squad --on "$ON"
    graph squad
    tasks squad squad 3 2 600 squad
}

running=()
of post_training post_training.py run "${TEXT[@]}" --out "$OUT/cells" &
running+=($!)
for task in sst2 cola mrpc stsb; do
    of "finetune-$task" finetune.py "$MINILM" --data "$DATA" --out "$OUT/models" --tasks "$task" --on "$ON" &
    running+=($!)
done
graph sst2 &
running+=($!)
questions &
questions=$!
TEXT+=(--out "$OUT/text" --steps 400 --precision bf16 --results "$OUT/results")
of perplexity perplexity_at_bits.py "${TEXT[@]}" --workers "$WORKERS"
for job in "${running[@]}"; do wait "$job"; done
of perplexity-report perplexity_at_bits.py "${TEXT[@]}" --report --post-training "$OUT/cells/cells.json"
tasks sst2 glue "$WORKERS" 1 1000 sst2 cola mrpc stsb
wait "$questions"
of summaries summaries.py run --articles "$DATA/cnndm/test.jsonl" --out "$OUT/summaries" --heldout 60 --on "$ON"
