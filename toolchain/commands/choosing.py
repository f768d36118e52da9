"""A budget → a policy for a supernet, by any of the methods there are.

    solver         the exact solver over the supernet's sensitivities
    meta-network   the supernet's own network, trained jointly with it, proposes; the solver projects onto the budget
    prices         one network for every device proposes; the solver projects
    search         LLM-QFA's: 150 random subnets are scored

A supernet that was trained for one provider serves another with the kernels that have the same codes; losses are those it was trained with.
Every method plans with room for the prediction's spread, and every answer keeps the budget in the cost model. `search` scores policies on
the supernet's calibration windows, so it needs torch; the others do not. Default is what `benchmarks/choosing.py` finds nearest to the
teacher on text that nobody had seen: the solver, at the tightest limit by a factor of four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from toolchain.commands.workflow import Choice, Costs, Source
from toolchain.costs.encoding import encode
from toolchain.costs.model import CostModel
from toolchain.errors import InfeasibleBudgetError, InputError, require
from toolchain.kernels import CATALOGUE, counterpart, parts
from toolchain.policy import budgets, prices, projection, proposal
from toolchain.policy.search import search
from toolchain.policy.solver import Values, measured_limits, solve
from toolchain.progress import note
from toolchain.spec import Budget, Policy
from toolchain.supernet.store import SupernetFolder
from toolchain.train.sampler import PolicySampler

METHODS = {
    "solver": "exact solver over sensitivities",
    "meta-network": "meta-network, projected",
    "prices": "network of prices, projected",
    "search": "LLM-QFA's search",
}
DEFAULT = "solver"
_HAIR = 1e-6
"""Loss that a kernel of two phases has beyond what it decodes with: its second set of weights is to be taken only where the time to the
first token asks for it."""


def choose(source: Source, costs: Costs, budget: Budget, method: str = DEFAULT) -> Choice:
    """The policy that a method finds for the budget. Needs a supernet.

    Where only a policy without room for the prediction's spread exists, says so and takes it. Raises InputError, InfeasibleBudgetError.
    """
    if method not in METHODS:
        raise InputError(f"expected a method among {', '.join(METHODS)}, got {method!r}", "type for example: --method solver")
    folder = source.supernet
    if folder is None:
        raise InputError(
            "expected a supernet to choose a policy from, got a model",
            "type: bittailor train MODEL --out SUPERNET, or add --policy",
        )
    measured, there = in_trained_names(costs, folder)
    model = restricted(measured, folder)
    _, unmeasured = measured_limits(model, budget)
    for resource in unmeasured:
        note(f"bittailor: {resource} is not measured on {model.device!r}: the policy is chosen without that limit")
    offered, losses = model, folder.sensitivity
    if budget.first_token_ms is not None:
        offered = _with_two_phases(model, measured)
        losses = _extended(losses, offered, _HAIR)
    plan = budgets.planned(budget, offered)
    try:
        policy = _found(method, folder, model, offered, losses, plan)
    except InfeasibleBudgetError:
        policy, plan = _found(method, folder, model, offered, losses, budget), budget
        note("bittailor: no policy keeps this budget with room for the prediction's spread; taking one without")
    gap = projection.gap_to_optimum(policy, offered, losses, plan)
    return Choice(Policy.of({unit: there[kernel] for unit, kernel in policy.items()}), METHODS[method], gap)


def in_trained_names(costs: Costs, folder: SupernetFolder) -> tuple[CostModel, dict[str, str]]:
    """(the costs of a device's kernels under the names that the supernet trained, those names → the device's own).

    A device of another provider than the supernet's has kernels of the same codes under other names.
    """
    trained = {
        name: own for name in costs.table.header.kernels if (own := counterpart(name, folder.kernels)) or CATALOGUE[name].prefill
    }
    here = {name: own or name for name, own in trained.items()}
    return costs.model.renamed(here), {own: name for name, own in here.items()}


def _found(method: str, folder: SupernetFolder, model: CostModel, offered: CostModel, losses: Values, plan: Budget) -> Policy:
    """One method's policy within `plan`. model: costs of the kernels that were trained; offered: those of two phases besides."""
    if method == "meta-network":
        likely = proposal.log_probabilities(folder.meta_network, encode(plan, model))
        return projection.project(_extended(likely, offered, -_HAIR), offered, plan)
    if method == "prices":
        worth = prices.proposal(prices.read(prices.SHIPPED), offered, losses, plan, prices.PROJECTED)
        return solve(offered, worth, plan).policy
    if method == "solver":
        return solve(offered, losses, plan).policy
    score = scorer(folder, folder.calibration())
    return search(score, model, plan, lambda kernels, bits, rng: PolicySampler(model.units, kernels).mixed(bits, rng)).policy


def scorer(folder: SupernetFolder, windows: np.ndarray) -> Callable[[Policy], float]:
    """policy → the supernet's distance to its teacher on token windows [n, T]. Kernels of two phases have no numbers of their own."""
    require("torch")
    from toolchain.supernet import saving
    from toolchain.train import quality
    from toolchain.train.team import Team

    return quality.scorer(saving.restore(folder, Team().device), windows)


def _with_two_phases(model: CostModel, measured: CostModel) -> CostModel:
    """Offer also the kernels that prefill with another, where their parts are offered."""

    def two_phase(unit: str) -> tuple[str, ...]:
        return tuple(
            name
            for name in measured.kernels[unit]
            if CATALOGUE[name].prefill and all(part.name in model.kernels[unit] for part in parts(CATALOGUE[name]))
        )

    return replace(model, kernels={unit: (*names, *two_phase(unit)) for unit, names in model.kernels.items()})


def _extended(values: Values, offered: CostModel, hair: float) -> dict[str, dict[str, float]]:
    """Values with those of kernels of two phases: of what they decode with, and `hair` more."""
    return {
        unit: {
            name: row[name] if name in row else row[parts(CATALOGUE[name])[0].name] + hair
            for name in dict.fromkeys((*row, *offered.kernels[unit]))
        }
        for unit, row in values.items()
    }


def restricted(model: CostModel, folder: SupernetFolder) -> CostModel:
    """The cost model over the kernels that the supernet's meta-network knows."""
    known = {unit: set(names) for unit, names in proposal.read(folder.meta_network)[0].items()}
    if set(known) != set(model.kernels):
        raise InputError(
            "expected a cost table of the supernet's own units, got another model's", "type: bittailor profile SUPERNET"
        )
    kernels = {unit: tuple(name for name in names if name in known[unit]) for unit, names in model.kernels.items()}
    return replace(model, kernels=kernels)
