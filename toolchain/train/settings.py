"""What a training run is set to. Every part of the method can be switched off, for ablations and for runs that do not need it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolchain.errors import InputError
from toolchain.train.losses import BALANCE

SAMPLINGS = ("sandwich", "balanced", "uniform")
LOSSES = ("interference", "mse")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What the pocket model was tuned with: see each field's reason. `benchmarks/ablations.py` measures the parts that can be taken out.

    sampling       which policies are trained: `schedule.py`
    loss           "interference": α·distance + β·penalty;  "mse": mean squared error of the outputs, every policy alike
    hidden_weight  of the hidden states' distance beside the outputs': blocks that answer for themselves should mix better with others
                   (screened in short runs alone; `ablations.py` has it as a variant); 0: hidden states are left alone
    lr             adapters of 3 bits and more, and shared ones: larger steps lose quality there
    low_lr         times lr for 2-bit kernels' own, which have further to go
    bound_lr       logarithms of the bounds: they live on a scale of 1, the adapters on one of 0.05
    average        parameters are averaged in the end, step t weighing t^(average − 1): about the last tenth of a run at 9; 0: the last ones
                   are taken. Near a rounding edge a weight goes to and fro, and its mean says on which side it belongs
    waves          triangle waves in a run
    a, balance     interference-aware loss
    likely         share of the other mixed visits that go to the solver's answers to random budgets: brings those nearer to the teacher,
                   at the expense of other policies
    meta_every     steps between two meta-network steps, 0: there is none; tau anneals from tau_start to tau_end
    cost_weight    pull of the expected cost under the budget; imitation_weight: of the exact solver's answers
    micro_batch    windows that go through the model at once, 0: all of the batch; gradients are accumulated
    precision      of the model's passes; weights are merged, quantised and stepped in fp32
    compiled       the model's passes are compiled, once for all policies, which takes a minute
    """

    sampling: str = "sandwich"
    loss: str = "interference"
    hidden_weight: float = 0.5
    lr: float = 2e-3
    low_lr: float = 2.5
    bound_lr: float = 1e-2
    warm_up: int = 10
    last_lr: float = 0.05
    average: int = 9
    waves: int = 4
    a: float = 1.0
    balance: float = BALANCE
    activations: bool = True
    imitation_lr: float = 1e-3
    meta_lr: float = 1e-4
    likely: float = 0.0
    meta_every: int = 4
    imitation_steps: int = 400
    scenarios: int = 240
    tau_start: float = 1.0
    tau_end: float = 0.3
    cost_weight: float = 1.0
    imitation_weight: float = 1.0
    micro_batch: int = 0
    precision: str = "fp32"
    compiled: bool = False
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for value, known in ((self.sampling, SAMPLINGS), (self.loss, LOSSES), (self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"expected one of {', '.join(known)}, got {value!r}")


TUNED = Settings()
POLISH = 0.25
"""Share of the learning rates with which a trained supernet's policy is polished."""


def polishing(settings: Settings, steps: int) -> Settings:
    """What a few more steps for one policy are set to (`adapt`): the same method at smaller rates."""
    rates = {name: getattr(settings, name) * POLISH for name in ("lr", "bound_lr")}
    return replace(settings, **rates, warm_up=max(1, steps // 5), meta_every=0)
