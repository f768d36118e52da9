"""What another device's policy costs: chosen for X under X's limits, run on Y, against what Y's own table chooses.

    python benchmarks/matrix.py choose SUPERNET --devices X Y ... --profiles DIR --text TEXT --work WORK     on the desk
    python benchmarks/matrix.py measure GRAPH --device Y --work WORK                                         for every device
    python benchmarks/matrix.py report --work WORK

choose: for each device three limits on latency, at --fractions of the way from its fastest policy to its slowest quantised one, and the
exact solver's policy for each. For every pair X, Y also Y's own policy for what X's loses: the fastest by Y's table whose predicted loss
is no larger. On a device of another provider a policy runs with the kernels of its bits there (`kernels.translated`). Perplexity is of the
packages themselves, on --text, on this machine. Where no quantised policy of Y's loses as little, the best of them stands there, and the
report says so.
measure: all policies that concern Y in one rotation, in two processes; weights are drawn, they do not change the time. GRAPH: the
supernet's `graph/` folder; the device may be reached over ssh. What is in WORK is not measured again.
report: for each Y, X's policy over Y's own at the same predicted loss (latency, perplexity), and over Y's own for the same fraction.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from toolchain import hardware
from toolchain.commands.choosing import choose
from toolchain.commands.workflow import Costs, opened
from toolchain.costs.from_table import cost_model
from toolchain.costs.table import open_table
from toolchain.evaluate import perplexity
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import assemble
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.kernels import CATALOGUE, counterpart, mean_bits, translated
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import latencies, levelled, subject
from toolchain.spec import Budget, Device, Policy, Workload
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents, load_tokenizer, separator_id, windows

FRACTIONS = (0.1, 0.3, 0.6)
WINDOW, BISECTIONS = 256, 12
WINDOWS, PROCESSES = 8, 2
AS_GOOD = 1.05
"""Predicted losses up to this ratio count as one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    chooser = commands.add_parser("choose")
    chooser.add_argument("supernet")
    chooser.add_argument("--devices", nargs="+", required=True, help="names in hardware/, or files")
    chooser.add_argument("--profiles", type=Path, required=True)
    chooser.add_argument("--text", type=Path, nargs="+", required=True)
    chooser.add_argument("--windows", type=int, default=64)
    chooser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    chooser.add_argument("--workload", type=Workload.parse, default=Workload.parse("generate:64+32"))
    chooser.set_defaults(run=write_policies)
    measurer = commands.add_parser("measure")
    measurer.add_argument("graph", type=Path)
    measurer.add_argument("--device", required=True)
    measurer.set_defaults(run=measure)
    commands.add_parser("report").set_defaults(run=report)
    for command in commands.choices.values():
        command.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


def write_policies(arguments: argparse.Namespace) -> None:
    """WORK/policies.json: every policy with its provider, the devices it concerns, mean bits, predicted loss, perplexity."""
    devices = {device.name: device for device in map(hardware.load, arguments.devices)}
    with opened(arguments.supernet) as source:
        folder, graph = source.supernet, source.graph
        assert folder
        costs = {}
        for name in devices:
            path = arguments.profiles / name / "table.jsonl"
            table = open_table(path)
            costs[name] = Costs(cost_model(graph, table, arguments.workload), table, path)

        def fastest(device: str, limit: float) -> Policy:
            return choose(source, costs[device], Budget(latency_ms=limit)).policy

        policies: dict[str, tuple[str, Policy, list[str]]] = {}
        for name in devices:
            low, high = _range(costs[name])
            for fraction in arguments.fractions:
                policy = fastest(name, low + fraction * (high - low))
                policies[f"{name} at {fraction}"] = (name, policy, list(devices))
                for other in (other for other in devices if other != name):
                    own = _as_good(
                        lambda limit, other=other: fastest(other, limit), _range(costs[other]), loss(folder, policy), folder
                    )
                    policies[f"{other} as good as {name} at {fraction}"] = (other, own, [other])
        text = windows(
            load_tokenizer(graph.directory), documents(arguments.text), WINDOW, separator_id(graph.directory), framed=False
        )[: arguments.windows]
        described = {"workload": str(arguments.workload), "windows": len(text), "fractions": list(arguments.fractions)}
        where = {name: {"provider": device.provider, **costs[name].table.header.identity} for name, device in devices.items()}
        seen: dict[Policy, float] = {}
        for policy in (None, *dict.fromkeys(policy for _, policy, _ in policies.values())):
            if policy:
                with scratch() as place:
                    assemble(graph, policy, source.weights, place)
                    seen[policy] = perplexity(place, text)[0]
            made = {
                label: {
                    "of": name,
                    "concerns": concerned,
                    "units": dict(policy),
                    "mean_bits": mean_bits(policy, graph.units),
                    "loss": loss(folder, policy),
                    "perplexity": seen.get(policy),
                }
                for label, (name, policy, concerned) in policies.items()
            }
            plan = {**described, "devices": where, "policies": made}  # once before the first perplexity: measuring need not wait
            write_atomic(arguments.work / "policies.json", json.dumps(plan, indent=1) + "\n")


def _range(costs: Costs) -> tuple[float, float]:
    """Lowest latency in ms, and that of the slowest quantised kernel of each unit."""
    model, table = costs.model, costs.model.per_unit["latency_ms"]
    slowest = {
        unit: max((name for name in names if CATALOGUE[name].quantised), key=table[unit].__getitem__)
        for unit, names in model.kernels.items()
    }
    return model.bounds("latency_ms")[0], model.totals(slowest)["latency_ms"]


def loss(folder: SupernetFolder, policy: Policy) -> float:
    """Sum of the supernet's sensitivities under a policy, of kernels of the same codes where it was trained for another provider."""
    rows = folder.sensitivity
    return sum(rows[unit][counterpart(kernel, rows[unit])] for unit, kernel in policy.items())


def _as_good(fastest, ends: tuple[float, float], wanted: float, folder: SupernetFolder) -> Policy:
    """The fastest policy whose loss is at most `wanted`, by bisection of the limit; of none that is, the best there is."""
    low, high = ends
    best = fastest(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        policy = fastest(middle)
        if loss(folder, policy) <= wanted:
            best, high = policy, middle
        else:
            low = middle
    return best


def measure(arguments: argparse.Namespace) -> None:
    """WORK/measured-<device>.json: label → {"latency_ms", "first_token_ms", "valid"} per process."""
    device: Device = hardware.load(arguments.device)
    done = arguments.work / f"measured-{device.name}.json"
    plan = json.loads((arguments.work / "policies.json").read_text())
    rounds = json.loads(done.read_text()) if done.exists() else []
    graph, workload = Graph.open(arguments.graph), Workload.parse(plan["workload"])
    wanted = {label: row for label, row in plan["policies"].items() if device.name in row["concerns"]}
    host = Host.of(device)
    while len(rounds) < PROCESSES:
        with scratch() as folder:
            subjects = []
            for number, label in enumerate(random.Random(len(rounds)).sample(list(wanted), len(wanted))):
                policy = Policy.of(wanted[label]["units"])
                if plan["devices"][wanted[label]["of"]]["provider"] != device.provider:
                    policy = translated(policy, graph.units, device.provider)
                place = folder / str(number)
                place.mkdir()
                assemble(graph, policy, drawn, place)
                subjects.append(subject(label, place, workload, graph.vocabulary))
            answer = host.time(subjects, WINDOWS)
        trials = levelled(answer["trials"])
        seen = {label: latencies(trials[label], answer["valid"]) for label in trials}
        rounds.append(
            {label: {name: value.value for name, value in row.items()} | {"valid": answer["valid"]} for label, row in seen.items()}
        )
        write_atomic(done, json.dumps(rounds) + "\n")


def report(arguments: argparse.Namespace) -> None:
    """One table a device, as Markdown."""
    plan = json.loads((arguments.work / "policies.json").read_text())
    policies = plan["policies"]
    print(f"{plan['workload']}; perplexity on {plan['windows']} windows of {WINDOW} tokens")
    for here in plan["devices"]:
        path = arguments.work / f"measured-{here}.json"
        if not path.exists():
            continue
        rounds = json.loads(path.read_text())
        disturbed = "" if all(row["valid"] for done in rounds for row in done.values()) else "; disturbed"
        print(f"\nRun on {here}, ms per token, {len(rounds)} processes{disturbed}\n")
        _row(
            "policy of",
            "limit",
            "bits",
            "ms",
            "perplexity",
            "own as good: ms",
            "perplexity",
            "ratio",
            "processes",
            "own for the limit",
            "ratio",
        )
        print(f"|{'---|' * 11}")
        for there in plan["devices"]:
            for fraction in plan["fractions"]:
                label, own = f"{there} at {fraction}", f"{here} at {fraction}"
                cells = [there, str(fraction), f"{policies[label]['mean_bits']:.2f}", f"{_ms(rounds, label):.4f}"]
                cells += [f"{policies[label]['perplexity']:.2f}"]
                if there == here:
                    _row(*cells, *["–"] * 6)
                    continue
                good = f"{here} as good as {there} at {fraction}"
                ratios = [done[label]["latency_ms"] / done[good]["latency_ms"] for done in rounds]
                as_good = policies[good]["loss"] <= policies[label]["loss"] * AS_GOOD
                cells += [f"{_ms(rounds, good):.4f}", f"{policies[good]['perplexity']:.2f}"]
                cells += [f"{mean(ratios):.3f}{'' if as_good else ' (own is less good)'}"]
                cells += [
                    ", ".join(f"{ratio:.3f}" for ratio in ratios),
                    f"{_ms(rounds, own):.4f}, {policies[own]['perplexity']:.2f}",
                ]
                _row(*cells, f"{_ms(rounds, label) / _ms(rounds, own):.3f}")


def _ms(rounds: Sequence[dict], label: str) -> float:
    return mean(done[label]["latency_ms"] for done in rounds)


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
