"""A small decoder on a board that does not exist: its graph without weights, its complete cost table, its cost model."""

from __future__ import annotations

from pathlib import Path

from small_tables import complete_table

from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.rows import Header
from toolchain.costs.table import CostTable
from toolchain.graph.model import Graph
from toolchain.kernels import offered
from toolchain.spec import Unit, Workload

HEADER = Header(
    device="board",
    cpu="a cpu (avx2)",
    provider="CPUExecutionProvider",
    threads=2,
    runtime="onnxruntime 1.31.1",
    protocol="interleaved windows",
    meter="none: no counter",
    reference_ns={"token": 9000.5, "streamed token": 8e5, "tokens": 7e5},
    date="2026-01-01",
    command="bittailor profile m --device board",
    kernels=offered(),
    cache_bytes=2**20,
)
UNITS = (
    Unit("embed", "Gather", 64, 512, "embedding", tied_to="head"),
    Unit("a", "MatMul", 64, 96),
    Unit("b", "MatMul", 160, 64),
    Unit("c", "MatMul", 64, 96),
    Unit("head", "MatMul", 64, 512, "head", tied_to="embed"),
)
GRAPH = Graph(Path("nowhere"), UNITS, "decoder", "LlamaForCausalLM", 1, 2, 16, 64, 512, 256, ("input_ids",), "m", "f" * 64)
WORKLOAD = Workload.parse("generate:64+32")


def board_table() -> CostTable:
    return complete_table(GRAPH, WORKLOAD, HEADER)


def board_model(table: CostTable, workload: Workload = WORKLOAD) -> CostModel:
    return cost_model(GRAPH, table, workload)
