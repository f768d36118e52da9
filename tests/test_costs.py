"""The cost table's file, and what is computed from it: totals, bounds, encoding, operations, derived budgets."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_costs import cost_model as by_hand
from small_tables import BYTES_PER_TOKEN, MS_PER_POSITION, OVERHEAD_BYTES, OVERHEAD_MS, complete_table, unit_ms

from toolchain.costs.calibrate import Sample, calibrate
from toolchain.costs.encoding import encode
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel, Tie
from toolchain.costs.operations import flops, working_set
from toolchain.costs.rows import Header, ModelMemoryRow, ModelRow, UnitRow, with_interpolation_errors
from toolchain.costs.table import CostTable, find_table, open_table, refuse_if_stale
from toolchain.errors import DamagedFileError, MissingCostError, StaleTableError
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates, runs_as, uniform
from toolchain.policy import budgets
from toolchain.policy.solver import solve
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import RESOURCES, Budget, Unit, Workload

HEADER = Header(
    device="board",
    cpu="a cpu (avx2)",
    provider="CPUExecutionProvider",
    threads=2,
    runtime="onnxruntime 1.31.1",
    protocol="interleaved windows",
    meter="none: no counter",
    reference_ns=123456.5,
    date="2026-01-01",
    command="bittailor profile m --device board",
    kernels=tuple(CATALOGUE),
    cache_bytes=2**20,
)
TIED = (
    Unit("embed", "Gather", 64, 512, "embedding", tied_to="head"),
    Unit("a", "MatMul", 64, 96),
    Unit("b", "MatMul", 160, 64),
    Unit("c", "MatMul", 64, 96),
    Unit("head", "MatMul", 64, 512, "head", tied_to="embed"),
)
GRAPH = Graph(Path("nowhere"), TIED, "decoder", "LlamaForCausalLM", 1, 2, 16, 64, 512, 256, ("input_ids",), "m", "f" * 64)
WORKLOAD = Workload.parse("generate:64+32")


def _table() -> CostTable:
    return complete_table(GRAPH, WORKLOAD, HEADER)


def _model(table: CostTable, workload: Workload = WORKLOAD) -> CostModel:
    return cost_model(GRAPH, table, workload)


# ---- the file


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = _table()
    table.save(tmp_path / "table.jsonl")
    assert open_table(tmp_path / "table.jsonl") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.jsonl"]


def test_the_text_does_not_depend_on_the_order_of_measuring(tmp_path: Path) -> None:
    table = _table()
    backwards = CostTable(table.header, dict(reversed(list(table.rows.items()))))
    table.save(tmp_path / "a")
    backwards.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    lines = (tmp_path / "a").read_text().splitlines()
    assert len(lines) == 1 + len(table.rows)
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_a_row_measured_again_takes_the_old_ones_place() -> None:
    table = _table()
    row = table.of(UnitRow)[0]
    again = table.adding([replace(row, latency_ms=9.0)])
    assert len(again.rows) == len(table.rows)
    assert again.rows[row.key].latency_ms == 9.0  # type: ignore[union-attr]
    assert table.rows[row.key] == row


def _rehashed(text: str) -> str:
    """The text with a header whose sha256 fits the body: damage that the hash does not tell."""
    head, _, body = text.partition("\n")
    return json.dumps({**json.loads(head), "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body


def _line(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    """Line `number` (from 1) as JSON through `change`, the rest as it was and the hash right."""

    def damage(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = json.dumps(change(json.loads(lines[number - 1])))
        return _rehashed("\n".join(lines) + "\n")

    return damage


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "line 1"),
    "not a table": (lambda text: "hello\n", "line 1"),
    "a list as header": (lambda text: "[]\n", "line 1"),
    "a number as header": (lambda text: "7\n", "line 1"),
    "another format": (_line(1, lambda head: {**head, "format": "bittailor cost table 1"}), "line 1"),
    "a header with a stranger": (_line(1, lambda head: {**head, "colour": 1}), "line 1"),
    "a header that lacks its CPU": (_line(1, lambda head: {key: head[key] for key in head if key != "cpu"}), "line 1"),
    "threads in words": (_line(1, lambda head: {**head, "threads": "two"}), "line 1"),
    "a hash of nothing": (lambda text: text.replace('"sha256": "', '"sha256": "0'), "sha256"),
    "cut in a line": (lambda text: text[:-20], "line"),
    "cut between lines": (lambda text: text[: text.rstrip("\n").rindex("\n") + 1], "sha256"),
    "a digit edited": (lambda text: text.replace('"n": 7', '"n": 8', 1), "sha256"),
    "a row of another kind": (_line(3, lambda row: {**row, "row": "colour"}), "line 3"),
    "a row that is a number": (_line(4, lambda row: 5), "line 4"),
    "a row that is text": (_line(4, lambda row: "five"), "line 4"),
    "a row with a stranger": (_line(3, lambda row: {**row, "colour": 1}), "line 3"),
    "a row that lacks its kernel": (_line(2, lambda row: {key: row[key] for key in row if key != "kernel"}), "line 2"),
    "a width that is a list": (_line(2, lambda row: {**row, "K": [64]}), "line 2"),
    "a time that is text": (_line(40, lambda row: {**row, "latency_ms": "fast"}), "line 40"),
    "a time that is not a number": (_line(40, lambda row: {**row, "latency_ms": float("nan")}), "line 40"),
    "bytes that are text": (_line(2, lambda row: {**row, "peak_bytes": None}), "line 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_refused_whole_naming_file_and_line(tmp_path: Path, name: str) -> None:
    damage, where = DAMAGES[name]
    path = tmp_path / "table.jsonl"
    _table().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedFileError) as caught:
        open_table(path)
    assert str(path) in str(caught.value)
    assert where in str(caught.value)
    assert "bittailor profile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b").mkdir()
    for name in ("a", "b", "absent"):
        with pytest.raises(DamagedFileError, match=name):
            open_table(tmp_path / name)


@pytest.mark.parametrize(
    "change", [{"cpu": "another"}, {"provider": "X"}, {"threads": 3}, {"runtime": "onnxruntime 1.32.0"}, {"protocol": "2"}]
)
def test_a_table_of_another_machine_is_stale(change: dict[str, Any]) -> None:
    with pytest.raises(StaleTableError, match=r"type: bittailor profile MODEL --device board --renew"):
        refuse_if_stale(_table(), replace(HEADER, **change))


def test_a_table_of_this_machine_is_not_stale_for_another_date_or_command() -> None:
    refuse_if_stale(_table(), replace(HEADER, date="2027-01-01", command="x", reference_ns=1.0, meter="rapl"))


def test_the_first_folder_with_a_table_wins(tmp_path: Path) -> None:
    for name in ("second", "third"):
        _table().save(tmp_path / name / "board" / "table.jsonl")
    folders = [tmp_path / name for name in ("first", "second", "third")]
    assert find_table("board", folders) == tmp_path / "second" / "board" / "table.jsonl"
    with pytest.raises(MissingCostError, match="bittailor profile MODEL --device other"):
        find_table("other", folders)


@pytest.mark.parametrize("kind", ["unit", "memory", "model", "model memory"])
def test_a_missing_row_names_the_command_that_measures_it(kind: str) -> None:
    table = _table()
    rows = {key: row for key, row in table.rows.items() if key[0] != kind}
    with pytest.raises(MissingCostError, match="type: bittailor profile MODEL --device board"):
        _model(CostTable(table.header, rows))


# ---- prediction


def _by_formula(policy: dict[str, str], workload: Workload) -> dict[str, float]:
    kernels = {unit: runs_as(policy[unit.name]) for unit in TIED}
    weight = sum(packed_bytes(unit, CATALOGUE[kernel]) for unit, kernel in kernels.items())
    prompt = workload.prompt_tokens
    cache = GRAPH.layers * 2 * GRAPH.kv_heads * GRAPH.head_dim * 4 * workload.positions
    return {
        "latency_ms": OVERHEAD_MS
        + MS_PER_POSITION * (prompt + workload.new_tokens // 2)
        + sum(unit_ms(unit, kernel, 1) for unit, kernel in kernels.items()),
        "first_token_ms": OVERHEAD_MS
        + sum(unit_ms(unit, kernel, 1 if unit.role == "head" else prompt) for unit, kernel in kernels.items()),
        "peak_memory_bytes": OVERHEAD_BYTES + BYTES_PER_TOKEN * prompt + 1.5 * weight + cache,
    }


@pytest.mark.parametrize("workload", ["generate:64+32", "generate:100+10", "generate:16+200", "generate:200+8"])
@pytest.mark.parametrize("name", ["fp32", "w8a8", "w4g32", "w2g128"])
def test_whole_models_that_are_their_units_sum_and_a_remainder_are_predicted_exactly(name: str, workload: str) -> None:
    """At the workload that was profiled, and between the points at which one model was measured for others."""
    policy, wanted = uniform(name, TIED), Workload.parse(workload)
    model = _model(_table(), wanted)
    totals = model.totals(policy)
    for resource, value in _by_formula(policy, wanted).items():
        assert totals[resource] == pytest.approx(value), resource
    assert model.relative_spread["latency_ms"] == pytest.approx(0, abs=1e-9)
    cost = model.predict(policy).to_json()
    assert cost["energy_mj"]["value"] is None
    assert "meter" in cost["energy_mj"]["reason"]
    assert cost["workload"] == workload
    assert set(cost) == {
        "latency_ms", "first_token_ms", "peak_memory_bytes", "package_bytes", "compute_flop", "energy_mj", "workload", "device"
    }  # fmt: skip


@pytest.mark.parametrize("workload", ["generate:8+8", "generate:255+1", "generate:1+255"])
def test_nothing_is_extrapolated(workload: str) -> None:
    """Below the least prompt that was measured, and beyond the most."""
    table = _table()
    rows = {key: row for key, row in table.rows.items() if not (isinstance(row, UnitRow | ModelRow) and row.tokens == 256)}
    with pytest.raises(MissingCostError, match="bittailor profile MODEL --device board"):
        _model(CostTable(table.header, rows), Workload.parse(workload))


@settings(deadline=None, max_examples=30)
@given(
    factors=st.lists(st.floats(0.9, 1.1), min_size=3, max_size=3),
    per_run=st.floats(0, 5),
    per_layer=st.floats(0, 2),
    seed=st.integers(0, 99),
)
def test_calibration_finds_the_factors_and_the_remainder(factors: list[float], per_run: float, per_layer: float, seed: int) -> None:
    """Within the noise that its prior takes every model to have: 1% of it."""
    import random

    rng = random.Random(seed)
    kernels = dict(zip(("w2g32", "w4g32", "w8g32"), factors, strict=True))
    samples = []
    for number in range(16):
        sums = {kernel: rng.uniform(1, 10) for kernel in kernels}
        layers = 4 + 2 * (number % 3)
        samples.append(
            Sample(sum(kernels[name] * value for name, value in sums.items()) + per_run + layers * per_layer, sums, layers)
        )
    found = calibrate(samples)
    sums = dict.fromkeys(kernels, 5.0)
    truth = sum(kernels[name] * value for name, value in sums.items()) + per_run + 24 * per_layer
    assert found.predict(sums, 8) == pytest.approx(truth - 16 * per_layer, rel=0.01)
    assert found.predict(sums, 24) == pytest.approx(truth, rel=0.1)
    assert found.spread < 0.02


def test_calibration_never_finds_a_negative_remainder() -> None:
    samples = [Sample(8.0 + number, {"w4g32": 10.0 + number}, 4) for number in range(6)]
    found = calibrate(samples)
    assert (found.per_run, found.per_layer) == (0.0, 0.0)
    with pytest.raises(ValueError, match="two or more"):
        calibrate(samples[:1])


def test_inner_points_of_the_grid_say_what_interpolation_gets_wrong() -> None:
    rows = [
        UnitRow("MatMul", 8, 8, "fp32", tokens, "cached", ms, 0.0, 7, True)
        for tokens, ms in ((1, 9.0), (16, 1.0), (64, 5.0), (256, 17.0))
    ]
    table = CostTable(HEADER, {}).adding(with_interpolation_errors(rows))
    unit = Unit("a", "MatMul", 8, 8)
    errors = {row.tokens: row.interpolation_error for row in table.of(UnitRow)}
    assert errors == {1: None, 16: None, 64: pytest.approx((5 - 4.2) / 5), 256: None}
    between = table.latency(unit, "fp32", 40, "cached")
    assert (between.latency_ms, between.interpolation_error) == (pytest.approx(3.0), pytest.approx(0.16))
    assert table.latency(unit, "fp32", 64, "cached").interpolation_error == 0.0
    for tokens in (2, 257):
        with pytest.raises(MissingCostError):
            table.latency(unit, "fp32", tokens, "cached")


def test_three_bits_cost_what_four_cost() -> None:
    model = _model(_table())
    assert model.totals(uniform("w3g32", TIED)) == pytest.approx(model.totals(uniform("w4g32", TIED)))


def test_a_tied_pair_of_one_kernel_is_packed_once() -> None:
    model = _model(_table())
    both = uniform("w4g32", TIED)
    apart = {**both, "embed": "w2g32"}
    once = packed_bytes(TIED[0], CATALOGUE["w4g32"])
    difference = model.totals(apart)["package_bytes"] - model.totals(both)["package_bytes"]
    assert difference == pytest.approx(packed_bytes(TIED[0], CATALOGUE["w2g32"]))
    assert once > 0


def test_the_spread_is_the_largest_error_with_which_the_others_predict_a_mixed_model() -> None:
    table = _table()
    off = next(row for row in table.of(ModelRow) if row.policy == "mixed-3" and row.phase == "decode")
    model = _model(table.adding([replace(off, latency_ms=1.2 * off.latency_ms)]))
    assert model.relative_spread["latency_ms"] == pytest.approx(1 - 1 / 1.2, abs=0.02)
    predicted = model.predict(uniform("w4g32", TIED)).latency_ms
    assert predicted.value is not None
    assert predicted.spread == pytest.approx(predicted.value * model.relative_spread["latency_ms"])


def test_what_does_not_fit_the_cache_is_streamed() -> None:
    bytes_ = sum(packed_bytes(unit, CATALOGUE["w4g32"]) for unit in TIED if unit.op != "Gather")
    assert working_set(TIED, "w4g32", bytes_) == "cached"
    assert working_set(TIED, "w4g32", bytes_ - 1) == "streamed"


@st.composite
def small_models(draw: st.DrawFn) -> CostModel:
    """Two tied pairs and up to two free units, three kernels; savings may exceed what they save from, which bounds must survive."""
    names = ["a", "b", "c", "d", "e", "f"][: draw(st.integers(4, 6))]
    number = st.sampled_from([0.0, 1.0, 2.5, 3.0, 7.0])
    kernels = {name: ("w2g32", "w4g32", "w8g32")[: draw(st.integers(1, 3))] for name in names}
    per_unit = {
        resource: {name: {kernel: draw(number) for kernel in kernels[name]} for name in names}
        for resource in ("peak_memory_bytes", "latency_ms")
    }
    ties = []
    for first, second in (("a", "b"), ("c", "d"))[: draw(st.integers(0, 2))]:
        shared = [kernel for kernel in kernels[first] if kernel in kernels[second]]
        ties.append(Tie((first, second), {kernel: {"peak_memory_bytes": draw(number)} for kernel in shared}))
    return by_hand(per_unit, {"peak_memory_bytes": draw(number), "latency_ms": draw(number)}, ties)


@settings(deadline=None, max_examples=60)
@given(model=small_models())
def test_bounds_are_the_least_and_the_most_of_all_policies(model: CostModel) -> None:
    names = list(model.kernels)
    policies = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*model.kernels.values())]
    for resource in model.per_unit:
        totals = [model.totals(policy)[resource] for policy in policies]
        assert model.bounds(resource) == (pytest.approx(min(totals)), pytest.approx(max(totals)))


@given(model=small_models(), data=st.data())
def test_totals_are_the_sum_less_what_tied_pairs_share(model: CostModel, data: st.DataObject) -> None:
    policy = {name: data.draw(st.sampled_from(kernels)) for name, kernels in model.kernels.items()}
    expected = model.fixed["peak_memory_bytes"]
    for name, kernel in policy.items():
        expected += model.per_unit["peak_memory_bytes"][name][kernel]
    for tie in model.ties:
        first, second = tie.units
        if policy[first] == policy[second]:
            expected -= tie.savings[policy[first]]["peak_memory_bytes"]
    assert model.totals(policy)["peak_memory_bytes"] == pytest.approx(expected)


# ---- encoding


def test_the_encoding_is_where_the_limit_lies_in_the_range() -> None:
    costs = {"a": {"w2g32": 1.0, "w8g32": 5.0}}
    model = by_hand(
        {"peak_memory_bytes": costs, "latency_ms": {"a": {"w2g32": 3.0, "w8g32": 3.0}}},
        {"peak_memory_bytes": 10.0, "latency_ms": 0.0},
    )
    assert encode(Budget(peak_memory_bytes=12.0), model) == (0.25, 1.0, 1.0, 1.0)
    assert encode(Budget(peak_memory_bytes=1.0), model) == (0.0, 1.0, 1.0, 1.0)
    assert encode(Budget(peak_memory_bytes=1e9), model) == (1.0, 1.0, 1.0, 1.0)
    assert encode(Budget(latency_ms=1.0), model) == (1.0, 1.0, 1.0, 1.0)  # no policy changes it
    assert encode(Budget(energy_mj=1.0, compute_flop=1.0), model) == (1.0, 1.0, 1.0, 1.0)  # nothing measured it


@given(memory=st.floats(1e-3, 1e12), latency=st.floats(1e-6, 1e6))
def test_every_encoding_is_between_0_and_1(memory: float, latency: float) -> None:
    model = _model(_SHARED)
    encoding = encode(Budget(peak_memory_bytes=memory, latency_ms=latency), model)
    assert len(encoding) == len(RESOURCES)
    assert all(0 <= value <= 1 for value in encoding)


_SHARED = _table()

# ---- operations


def test_operations_of_a_decoder_by_hand() -> None:
    """2 linears of 3 → 5 and a head of 3 → 7; 2 tokens in, 1 out; width 3, 4 layers.

    Linears: 2·2·15 = 60 per token, 3 tokens: 180. The head works on the prompt's last position and on the new token: 2·2·21 = 84.
    Attention: token t attends to t, 1 + 2 + 3 = 6 pairs, each 2 products of width 3, 2 operations each: 4·3·6 = 72 per layer, 288."""
    units = (Unit("e", "Gather", 3, 7), Unit("a", "MatMul", 3, 5), Unit("b", "MatMul", 3, 5), Unit("h", "MatMul", 3, 7, "head"))
    assert flops(units, Workload.parse("generate:2+1"), layers=4, width=3) == 180 + 84 + 288


def test_operations_of_an_encoder_by_hand() -> None:
    """One linear 3 → 5; 2 sequences of 4 tokens: 2·15·8 = 240; attention 4·3·16 pairs·1 layer·2 = 384."""
    assert flops((Unit("a", "MatMul", 3, 5),), Workload.parse("encode:2x4"), layers=1, width=3) == 240 + 384


# ---- derived budgets


def _noisy(seed: int, size: float) -> CostModel:
    """A cost model of a machine whose whole models were measured with an error of up to `size`."""
    import random

    rng = random.Random(seed)
    table = _table()
    rows = [
        replace(
            row,
            latency_ms=row.latency_ms * (1 + rng.uniform(-size, size)),
        )
        for row in table.of(ModelRow)
    ]
    weights = [replace(row, peak_bytes=row.peak_bytes * (1 + rng.uniform(-size, size))) for row in table.of(ModelMemoryRow)]
    return _model(table.adding([*rows, *weights]))


@pytest.mark.parametrize("size", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_derived_budgets_are_ordered_and_can_be_kept_with_room(seed: int, size: float) -> None:
    model = _noisy(seed, size)
    derived = budgets.derive(model)
    assert list(derived) == ["low", "medium", "high"]
    low, medium, high = derived.values()
    for resource in ("peak_memory_bytes", "latency_ms"):
        assert 0 < low.limits[resource] <= medium.limits[resource] <= high.limits[resource]
    for budget in derived.values():
        plan = budgets.planned(budget, model)
        policy = solve(model, model.per_unit["package_bytes"], plan).policy
        totals = model.totals(policy)
        assert all(totals[resource] <= limit * (1 + 1e-9) for resource, limit in plan.limits.items())
        assert Budget.from_json(budget.to_json()) == budget


def test_a_low_budget_keeps_fp32_out() -> None:
    model = _model(_table())
    everything = uniform("fp32", TIED)
    assert model.totals(everything)["peak_memory_bytes"] > budgets.derive(model)["high"].limits["peak_memory_bytes"]


def test_a_promise_is_the_prediction_with_room() -> None:
    model = _noisy(1, 0.05)
    totals = model.totals(uniform("w4g32", TIED))
    promise = budgets.promise(totals, model).limits
    assert promise["peak_memory_bytes"] >= totals["peak_memory_bytes"]
    assert promise["latency_ms"] >= totals["latency_ms"] * (1 + budgets.DRIFT)


def test_every_candidate_has_a_cost_in_every_resource() -> None:
    model = _model(_table())
    for costs in model.per_unit.values():
        for unit in TIED:
            assert set(costs[unit.name]) == set(candidates(unit))
