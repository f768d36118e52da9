"""`--allow-predicted`: what was never measured, from what was; how wrong that is, where it is said, and where it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fast_host import FastHost
from small_tables import complete_table, header_here

from toolchain.costs.borrowed import Known, Whole, borrow, describe, shape_of
from toolchain.costs.from_table import cost_model
from toolchain.costs.predictor import Errors, Guess, ShapePredictor, guesses_spread
from toolchain.costs.rows import MemoryRow, ModelRow, ModelShapeRow, UnitRow
from toolchain.costs.table import CostTable, open_table
from toolchain.errors import DamagedFileError, MissingCostError
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, offered, uniform
from toolchain.package.manifest import open_package
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Unit, Workload

Cli = Callable[..., Any]
WORKLOAD = Workload.parse("generate:64+32")
PREDICTED = {"latency_ms", "first_token_ms", "peak_memory_bytes"}


def _graph(hidden: int, name: str, layers: int = 2, kind: str = "decoder") -> Graph:
    """A decoder of five shapes of linears, or an encoder of the same."""
    sizes = {"qkv": (hidden, 3 * hidden // 2), "o": (hidden, hidden), "up": (hidden, 3 * hidden), "down": (3 * hidden, hidden)}
    inner = [Unit(f"layers.{i}.{part}", "MatMul", K, N) for i in range(layers) for part, (K, N) in sizes.items()]
    units = (Unit("embed", "Gather", hidden, 512, "embedding"), *inner, Unit("head", "MatMul", hidden, 512, "head"))
    return Graph(Path(), units, kind, "LlamaForCausalLM", layers, 2, 16, hidden, 512, 256, ("input_ids",), name, name * 64)


KNOWN = [_graph(128, "a"), _graph(256, "b", layers=3), _graph(512, "c")]
NEW = _graph(384, "d")


def _tables(graphs: Iterable[Graph], workload: Workload = WORKLOAD) -> CostTable:
    table = CostTable(header_here(), {})
    for graph in graphs:
        table = table.adding(complete_table(graph, workload, header_here()).rows.values())
    return table


ALL = _tables(KNOWN)
TRUTH = _tables([NEW])
PREDICTOR = ShapePredictor.of([ALL])


# ---- shapes


def _formula(seed: int) -> Callable[[Unit, str, int], tuple[float, float]]:
    """(ms, peak bytes) of a unit: overhead, bytes from memory, operations and activations, each at a speed of this machine's own."""
    rng = random.Random(seed)
    start, byte, operation = 10 ** rng.uniform(-4, -2.5), 10 ** rng.uniform(-8.5, -7), 10 ** rng.uniform(-9.5, -8)
    swell, page = rng.uniform(1, 2), rng.uniform(0, 4e4)

    def costs(unit: Unit, kernel: str, tokens: int) -> tuple[float, float]:
        weight = packed_bytes(unit, CATALOGUE[kernel])
        noise = rng.uniform(0.97, 1.03)
        return noise * (start + byte * weight + operation * unit.parameters * tokens), noise * (page + swell * weight)

    return costs


@pytest.mark.parametrize("seed", range(4))
def test_other_shapes_are_predicted_within_the_error_that_is_stated(seed: int) -> None:
    """Nine of ten shapes inside the range that was measured, of two kernels and at any number of tokens."""
    rng, formula = random.Random(seed), _formula(seed)
    widths = [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    rows: list[UnitRow | MemoryRow] = []
    corners = [(256, 256), (4096, 4096), (256, 4096), (4096, 256)]
    for K, N in corners + [(rng.choice(widths), rng.choice(widths)) for _ in range(6)]:
        for kernel in ("fp32", "w4g32"):
            unit = Unit("", "MatMul", K, N)
            times = {tokens: formula(unit, kernel, tokens)[0] for tokens in (1, 16, 64, 256)}
            rows += [UnitRow(*unit.shape, kernel, tokens, "cached", time, 0.0, 7, True) for tokens, time in times.items()]
            rows.append(MemoryRow(*unit.shape, kernel, formula(unit, kernel, 1)[1], packed_bytes(unit, CATALOGUE[kernel]), 2))
    predictor = ShapePredictor.of([CostTable(header_here(), {}).adding(rows)])
    for regime in ("one", "many", "memory"):
        kept = []
        for _ in range(40):
            unit, kernel = Unit("", "MatMul", rng.randrange(256, 4096, 32), rng.randrange(256, 4096)), rng.choice(["fp32", "w4g32"])
            tokens = 1 if regime == "one" else rng.randrange(2, 256)
            guess = predictor.peak_bytes(unit, kernel) if regime == "memory" else predictor.latency(unit, kernel, tokens)
            truth = formula(unit, kernel, tokens)[regime == "memory"]
            assert not guess.beyond
            assert guess.value > 0
            kept.append(abs(guess.value / truth - 1) <= guess.errors.spread + 0.03)  # the truth has its own noise
        assert sum(kept) >= 36, (regime, guess.errors)


def test_the_error_beyond_all_measured_shapes_is_not_known() -> None:
    """Nothing that could be left out tells it: all of the value counts as spread, and the note says why."""
    inside = PREDICTOR.latency(Unit("", "MatMul", 300, 300), "w4g32", 1)
    assert (inside.beyond, inside.spread) == (False, inside.errors.spread)
    outside = PREDICTOR.latency(Unit("", "MatMul", 4096, 4096), "w4g32", 1)
    assert outside.beyond
    assert outside.spread >= 1
    large = _graph(1024, "l")  # all but its head, 1024 x 512
    note = cost_model(large, ALL, WORKLOAD, PREDICTOR).notes["latency_ms"]
    assert f"not known of {len(large.units) - 1} that are larger or smaller than all that were measured" in note


@pytest.mark.parametrize("what", ["time", "memory"])
def test_three_shapes_are_too_few(what: str) -> None:
    shapes = {(row.K, row.N) for row in ALL.of(MemoryRow) if row.op == "MatMul"}
    few = sorted(shapes)[:3]
    rows = {key: row for key, row in ALL.rows.items() if getattr(row, "op", "") != "MatMul" or (row.K, row.N) in few}  # type: ignore[union-attr]
    predictor = ShapePredictor.of([CostTable(ALL.header, rows)])
    unit = Unit("", "MatMul", 384, 384)
    with pytest.raises(MissingCostError, match=r"4 or more measured shapes of MatMul w4g32 .*found 3.*bittailor profile MODEL"):
        predictor.latency(unit, "w4g32", 1) if what == "time" else predictor.peak_bytes(unit, "w4g32")


def test_disturbed_rows_are_not_learnt_from() -> None:
    wrong = [
        replace(row, latency_ms=50 * row.latency_ms, valid=False, tokens=row.tokens + 1)
        for row in ALL.of(UnitRow)
        if row.tokens > 1
    ]
    unit = Unit("", "MatMul", 384, 384)
    assert ShapePredictor.of([ALL.adding(wrong)]).latency(unit, "w4g32", 64) == PREDICTOR.latency(unit, "w4g32", 64)


def test_other_tables_of_the_device_count_at_the_first_ones_speed() -> None:
    """The same machine, half as fast when it measured the second table; a table of another machine counts for nothing."""
    twice = {work: 2 * time for work, time in ALL.header.reference_ns.items()}
    slow = CostTable(replace(ALL.header, reference_ns=twice), {}).adding(
        replace(row, latency_ms=2 * row.latency_ms) if isinstance(row, UnitRow | ModelRow) else row for row in ALL.rows.values()
    )
    alien = replace(slow, header=replace(slow.header, cpu="another"))
    empty = CostTable(ALL.header, {})
    unit = Unit("", "MatMul", 384, 384)
    both = ShapePredictor.of([empty, slow, alien])
    assert both.latency(unit, "w4g32", 64).value == pytest.approx(PREDICTOR.latency(unit, "w4g32", 64).value)
    assert both.table.header == ALL.header
    with pytest.raises(MissingCostError, match="found 0"):
        ShapePredictor.of([empty, alien]).latency(unit, "w4g32", 64)


# ---- models


def test_what_was_measured_is_never_predicted() -> None:
    table = ALL.adding(TRUTH.rows.values())
    for graph in (*KNOWN, NEW):
        assert cost_model(graph, table, WORKLOAD, ShapePredictor.of([table])) == cost_model(graph, table, WORKLOAD)


def test_a_new_model_is_refused_unless_asked_for() -> None:
    with pytest.raises(MissingCostError, match="type: bittailor profile MODEL --device local"):
        cost_model(NEW, ALL, WORKLOAD)


@pytest.mark.parametrize("kernel", ["fp32", "w4g32"])
def test_a_new_model_is_predicted_within_its_spread_and_marked(kernel: str) -> None:
    predicted = cost_model(NEW, ALL, WORKLOAD, PREDICTOR).predict(uniform(kernel, NEW.units)).to_json()
    truth = cost_model(NEW, TRUTH, WORKLOAD).totals(uniform(kernel, NEW.units))
    assert {name for name, entry in predicted.items() if isinstance(entry, dict) and "note" in entry} == PREDICTED
    for name in PREDICTED:
        entry = predicted[name]
        assert abs(entry["value"] - truth[name]) <= entry["spread"], name
        assert (
            f"{len(NEW.units)} of {len(NEW.units)} units predicted from other shapes (leave-one-shape-out error: median"
            in entry["note"]
        )
        assert "90th percentile" in entry["note"]
        assert "remainder taken from 3 other models (leave-one-model-out error" in entry["note"]
    assert predicted["package_bytes"]["value"] == truth["package_bytes"]


def test_one_missing_shape_is_counted_and_adds_no_more_than_its_share() -> None:
    table = ALL.adding(TRUTH.rows.values())
    rows = {
        key: row for key, row in table.rows.items() if not (isinstance(row, UnitRow | MemoryRow) and (row.K, row.N) == (384, 1152))
    }
    lacking = CostTable(table.header, rows)
    model = cost_model(NEW, lacking, WORKLOAD, ShapePredictor.of([lacking]))
    whole = cost_model(NEW, ALL, WORKLOAD, PREDICTOR)
    assert set(model.notes) == PREDICTED
    for name in PREDICTED:
        assert model.notes[name].startswith(f"2 of {len(NEW.units)} units predicted")
        assert "remainder" not in model.notes[name]
    assert 0 < model.relative_spread["latency_ms"] < whole.relative_spread["latency_ms"]


def test_a_prediction_is_as_unsure_as_its_unsure_part() -> None:
    """Of 8 ms, 3 are measured, 1 is the remainder, 4 rest on a fit that is 20% off: 0.8 of 8."""
    guesses = {("b", "w4g32"): Guess(4.0, Errors((0.2,)), "MatMul", False)}
    assert guesses_spread(guesses, {"a": {"w4g32": 3.0}, "b": {"w4g32": 4.0}}, 1.0) == pytest.approx(0.1)
    table = ALL.adding(TRUTH.rows.values())
    rows = {key: row for key, row in table.rows.items() if not (isinstance(row, UnitRow) and (row.K, row.N) == (384, 1152))}
    model = cost_model(NEW, CostTable(table.header, rows), WORKLOAD, PREDICTOR)
    unsure = {
        (unit.name, name): PREDICTOR.latency(unit, name.replace("w3", "w4"), 1)
        for unit in NEW.units
        for name in offered()
        if unit.N == 1152
    }
    added = guesses_spread(unsure, model.per_unit["latency_ms"], model.fixed["latency_ms"])
    assert 0 < added <= model.relative_spread["latency_ms"]


def test_a_remainder_grows_with_the_model() -> None:
    """Three models whose remainder is one part in a thousand of their size: the fourth's is too, and leaving one out is never wrong."""
    known = []
    for size in (100.0, 300.0, 900.0):
        units = (Unit("a", "MatMul", int(size), 64),)
        known.append(Known(units, size, {"a": {"fp32": 1.0}}, Whole({"fp32": 0.8}, size / 1000, 0.05)))
    lent = borrow((Unit("a", "MatMul", 64, 64),), 500.0, {"a": {"fp32": 1.0}}, known)
    assert (lent.remainder, lent.factors) == (pytest.approx(0.5), {"fp32": 0.8})
    assert lent.spread == pytest.approx(0, abs=1e-12)
    off = replace(known[0], whole=replace(known[0].whole, remainder=0.19))
    # The largest model, by the middle of 1.9 and 1 thousandths: 0.8 + 900 x 0.00145 instead of 1.7.
    assert borrow(NEW.units, 500.0, {}, [off, *known[1:]]).spread == pytest.approx(2.105 / 1.7 - 1)


def test_one_other_model_says_nothing_of_its_own_error() -> None:
    """The whole remainder is spread."""
    table = _tables(KNOWN[2:])
    model = cost_model(NEW, table, WORKLOAD, ShapePredictor.of([table]))
    low = model.bounds("latency_ms")[0]
    for name in PREDICTED:
        assert "one other model: its error is not known" in model.notes[name]
    assert model.relative_spread["latency_ms"] >= model.fixed["latency_ms"] / low


def test_a_model_of_the_same_shape_lends_what_was_measured() -> None:
    """A fine-tune of a profiled model costs what that costs: nothing but the weights' values differs."""
    tuned = replace(KNOWN[1], fingerprint="e" * 64)
    lent, own = cost_model(tuned, ALL, WORKLOAD, PREDICTOR), cost_model(KNOWN[1], ALL, WORKLOAD)
    assert (lent.per_unit, lent.fixed, lent.relative_spread) == (own.per_unit, own.fixed, own.relative_spread)
    assert set(lent.notes) == PREDICTED
    assert all("another model of the same shape" in note for note in lent.notes.values())


@pytest.mark.parametrize("change", ["another kind", "not described", "another point"])
def test_without_a_model_of_its_kind_there_is_no_remainder(change: str) -> None:
    graph, table, workload = NEW, ALL, WORKLOAD
    if change == "another kind":
        graph, workload = replace(NEW, kind="encoder"), Workload.parse("encode:1x128")
    elif change == "not described":
        table = CostTable(ALL.header, {key: row for key, row in ALL.rows.items() if not isinstance(row, ModelShapeRow)})
    else:
        workload = Workload.parse("generate:8+8")  # fewer tokens than were measured: whole models are not extrapolated
    with pytest.raises(MissingCostError, match=r"this (decoder|encoder) or another one") as caught:
        cost_model(graph, table, workload, ShapePredictor.of([table]))
    assert "\n" not in str(caught.value)
    assert "type: bittailor profile MODEL --device local" in str(caught.value)


def test_a_description_reads_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    table = CostTable(ALL.header, {}).adding([describe(NEW)])
    table.save(path)
    assert open_table(path) == table
    assert [unit.shape for unit in shape_of(open_table(path).of(ModelShapeRow)[0]).units] == [unit.shape for unit in NEW.units]
    path.write_text(path.read_text().replace('["MatMul", 384,', '["MatMul", "wide",', 1))
    with pytest.raises(DamagedFileError, match="line 2"):
        open_table(path)


# ---- the command


@pytest.fixture
def lacking(graphs: Any, models: Any, tmp_path: Path) -> tuple[Path, Path]:
    """(model, --profiles): a real, tiny decoder, and a table of wider made-up ones alone."""
    graph = graphs("qwen2")
    wider = []
    for factor, name in ((2, "x"), (3, "y")):
        units = tuple(
            replace(unit, K=factor * unit.K, N=unit.N if unit.role != "linear" else factor * unit.N) for unit in graph.units
        )
        wider.append(replace(graph, units=units, hidden=factor * graph.hidden, fingerprint=name * 64))
    table = _tables(wider)
    table.save(tmp_path / "profiles" / "local" / "table.jsonl")
    return models("qwen2"), tmp_path / "profiles"


def test_every_output_that_used_a_prediction_says_so(lacking: tuple[Path, Path], tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    model, profiles = lacking
    words = (model, "--policy", "w4g32", "--profiles", profiles)
    refused = cli("predict", *words).error
    assert "bittailor profile MODEL --device local, or add --allow-predicted" in refused

    said = cli("predict", *words, "--allow-predicted", "--json").json
    notes = {name: said[name]["note"] for name in PREDICTED}
    assert all("units predicted from other shapes (leave-one-shape-out error: median" in text for text in notes.values())
    text = cli("predict", *words, "--allow-predicted").out
    assert all(f"{name}: {text_}" in text for name, text_ in notes.items())

    out = tmp_path / "out"
    exported = cli("export", *words, "--allow-predicted", "--out", out, "--json").json
    assert {name: exported["predicted"][name]["note"] for name in PREDICTED} == notes
    assert open_package(out).predicted == exported["predicted"] == said
    assert all(text_ in cli("export", *words, "--allow-predicted", "--out", out).out for text_ in notes.values())

    checked = cli("check", out, "--json")
    assert {name: checked.json["predicted"][name]["note"] for name in PREDICTED} == notes
    assert all(f"predicted {name}: {text_}" in cli("check", out).out for name, text_ in list(notes.items())[:1])


def test_without_the_flag_nothing_is_predicted(lacking: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    model, profiles = lacking
    words = (model, "--profiles", profiles, "--out", tmp_path / "out")
    assert "or add --allow-predicted" in cli("export", *words, "--latency-ms", "1").error
    exported = cli("export", *words, "--policy", "w4g32", "--json")
    assert exported.json["predicted"] is None
    assert "or add --allow-predicted" in exported.err
    assert "--allow-predicted" not in cli("train", model, "--profiles", profiles, "--out", tmp_path / "supernet").error


def test_a_device_without_any_table_has_nothing_to_predict_from(lacking: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    line = cli("predict", lacking[0], "--policy", "w4g32", "--profiles", tmp_path / "none", "--allow-predicted").error
    assert "bittailor profile MODEL --device local" in line
    assert "--allow-predicted" not in line
