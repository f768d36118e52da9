"""The supernet in torch: a frozen Hugging Face model and, per kernel and layer, frozen weights, LoRA adapters and bounds.

Owns the forward pass of a policy and the codes it used. The merge is quantisation-aware: the forward pass uses

    Ŵ = Q_b(W_b + (alpha/r)·B_b·A_b; −exp(low), exp(high))        straight-through gradient to A and B, true gradient to the bounds

so what is exported is a plain integer kernel and equals what was trained (method: LLM-QFA's decoupled weights and adapters,
arXiv:2405.20202, with learned ranges). W_b is where GPTQ leaves the weights (`starts.py`), above 4 bits the model's own; B_b·A_b are the
kernel's adapters (`adapters.py`).

There is no active subnet: a policy is an argument of every call, weights are passed in by `functional_call`, and the hooks that quantise
activations live as long as one call. A tied embedding and head have the same adapters, hence the same codes where kernels agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE, candidates
from toolchain.quantize.affine import Quantized, groups
from toolchain.quantize.fake import codes, fake_quantise, fake_quantise_activation, fake_quantise_chosen
from toolchain.spec import Kernel, Policy, Unit
from toolchain.supernet.adapters import OWN, RANK, Adapters, started
from toolchain.supernet.passes import Output, Pass, Trace
from toolchain.supernet.starts import Frozen, bounded, frozen_start, search

FROZEN = ("places", "low", "high")


def _grid(kernel: Kernel) -> tuple[str, int]:
    """What decides how a kernel quantises its input."""
    return kernel.activation, kernel.group_size if kernel.activation == "int8_group" else 0


class Supernet:
    """model: frozen here. units: what gets kernels. kernels: names, those not legal for a unit are skipped for it.

    parameters   every trained tensor, "kernel/module/part" with part in A [r, K], B [N, r], low, high [N, G] (logarithms of the bounds);
                 what kernels share is "shared/module/part"
    frozen       "kernel/module" → weights that the adapters are added to, where they are not the model's own
    kernels      unit → its kernel names, in catalogue order
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        kernels: Iterable[str],
        rank: int = RANK,
        alpha: float | None = None,
        seed: int = 0,
        moments: Mapping[str, Tensor] | None = None,
        start: bool = True,
        adapters: str = OWN,
    ) -> None:
        """moments: module → mean of x xᵀ over its inputs [K, K] (`input_moments`), for GPTQ; without, bounds are searched and weights left
        as they are. start: False where `load` will overwrite it anyway; it is most of the time this takes. adapters: their kind, see
        `adapters.py`; "shared" and "pooled" cannot be saved."""
        self.model = model.requires_grad_(False)
        self.passes = Pass.of(model)
        self.units = tuple(units)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        # A kernel of two phases has no numbers of its own: its parts are trained.
        available = tuple(name for name in kernels if not CATALOGUE[name].prefill)
        self.kernels = {unit.name: candidates(unit, available) for unit in self.units}
        self._owner = self._owners()
        self.parameters: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, Frozen] = {}
        offered = self._offered()
        self.adapters = Adapters(adapters, rank)
        generator = torch.Generator().manual_seed(seed)
        for stem, size in self.adapters.ranks(offered).items():
            name, _, module = stem.partition("/")
            N, K = self._weight(module).shape
            self._watch(stem, started(size, N, self.adapters.inputs(name, K), generator))
        for module, names in offered.items():
            for kernel in (CATALOGUE[name] for name in names):
                if bounded(kernel):
                    self._start(kernel, module, (moments or {}).get(module), start)

    def _offered(self) -> dict[str, dict[str, None]]:
        """module that owns a weight tensor → the quantised kernels that it or one that shares the tensor may have."""
        offered: dict[str, dict[str, None]] = {}
        for unit in self.units:
            for module in unit.modules:
                names = (name for name in self.kernels[unit.name] if CATALOGUE[name].quantised)
                offered.setdefault(self._owner[module], {}).update(dict.fromkeys(names))
        return offered

    def _owners(self) -> dict[str, str]:
        """module → the first module with the same weight tensor, whose adapters both use. Checks that layers are what units say."""
        first: dict[int, str] = {}
        owner = {}
        for unit in self.units:
            rows = 0
            for module in unit.modules:
                try:
                    layer = self.model.get_submodule(module)
                except AttributeError:
                    raise InputError(
                        f"expected a layer {module!r} for unit {unit.name!r}, the model has none of that name"
                    ) from None
                if not isinstance(layer, nn.Linear | nn.Embedding):
                    raise InputError(f"expected a linear or embedding layer at {module!r}, got {type(layer).__name__}")
                rows += layer.weight.shape[0]
                owner[module] = first.setdefault(id(layer.weight), module)
                if layer.weight.shape[1] != unit.K:
                    raise InputError(f"expected K={unit.K} at {module!r}, got {layer.weight.shape[1]}")
            if rows != unit.N:
                raise InputError(f"expected {unit.N} rows in unit {unit.name!r}, its layers have {rows}")
        return owner

    def _start(self, kernel: Kernel, module: str, moment: Tensor | None, searched: bool) -> None:
        """Bounds from the search, frozen weights from GPTQ."""
        stem, weight = f"{kernel.name}/{module}", self._weight(module)
        low, high = (torch.ones(weight.shape[0], groups(weight.shape[1], kernel)[0]) * sign for sign in (-1, 1))
        if searched:
            low, high = search(weight, kernel, None if moment is None else moment.diagonal())
            if moment is not None:
                self.frozen[stem] = frozen_start(weight, moment, kernel, low, high)
        self._watch(stem, {"low": low.neg().log(), "high": high.log()})

    def _watch(self, stem: str, parts: Mapping[str, Tensor]) -> None:
        for part, tensor in parts.items():
            self.parameters[f"{stem}/{part}"] = nn.Parameter(tensor.to(self.device))

    @property
    def device(self) -> torch.device:
        """Where the model lives; its adapters live there too."""
        return self._weight(self.units[0].modules[0]).device

    @property
    def kind(self) -> str:
        """ "decoder", "encoder" or "encoder-decoder"."""
        return self.passes.kind

    def owner(self, module: str) -> str:
        """The module whose adapters this one uses: itself, or the first with the same weight tensor."""
        return self._owner[module]

    def row_parameters(self) -> dict[str, nn.Parameter]:
        """B, low and high of embeddings that no head shares, [vocabulary, ...]: a pass uses the rows of its tokens and no others."""
        owners = {
            op: {self._owner[module] for unit in self.units if unit.op == op for module in unit.modules}
            for op in ("Gather", "MatMul")
        }
        looked_up = owners["Gather"] - owners["MatMul"]
        return {name: each for name, each in self.parameters.items() if name.split("/")[1] in looked_up and not name.endswith("/A")}

    def tensor_key(self, unit: Unit) -> tuple[str, ...]:
        """Equal for two units that share their weight tensors."""
        return tuple(self._owner[module] for module in unit.modules)

    def _weight(self, module: str) -> Tensor:
        return self.model.get_submodule(module).get_parameter("weight")

    def _quantiser_inputs(self, modules: Sequence[str], kernel: Kernel) -> tuple[Tensor, Kernel, Tensor | None, Tensor | None]:
        """The arguments of `fake_quantise` and of `codes` for the stacked rows of modules of one width: computed in this one place, so the
        two cannot differ."""
        get, stems = self.parameters, [f"{kernel.name}/{self._owner[module]}" for module in modules]
        merged, frozen = [], self._frozen_weights(stems, kernel)
        for module, stem in zip(modules, stems, strict=True):
            weight = frozen[stem] if stem in frozen else self._weight(module)
            for adapter in self.adapters.of(kernel.name, self._owner[module]) if self.adapters.requantised else ():
                weight = torch.addmm(weight, get[f"{adapter}/B"], get[f"{adapter}/A"], alpha=self.alpha / self.rank)
            merged.append(weight)
        if not bounded(kernel):
            return torch.cat(merged), kernel, None, None
        low, high = (torch.cat([get[f"{stem}/{end}"] for stem in stems]).exp() for end in ("low", "high"))
        return torch.cat(merged), kernel, -low, high

    def _shifts(self, owners: Sequence[str], kernel: Kernel) -> Tensor:
        """What pooled adapters add to the dequantised weights [N, K]: one number a group, so it moves zero points alone."""
        get, stems = self.parameters, [f"{kernel.name}/{owner}" for owner in owners]
        K = self._weight(owners[0]).shape[1]
        width = groups(K, kernel)[1]
        moved = torch.cat([get[f"{stem}/B"] @ get[f"{stem}/A"] for stem in stems]) * (self.alpha / self.rank / width)
        return moved.repeat_interleave(width, 1)[:, :K]

    def _frozen_weights(self, stems: Sequence[str], kernel: Kernel) -> dict[str, Tensor]:
        """ "kernel/module" → the weight held for it, of those that have one; unpacked in one go."""
        held = {stem: self.frozen[stem] for stem in stems if stem in self.frozen}
        if not held:
            return {}
        stacked = Frozen(*(torch.cat([getattr(each, part) for each in held.values()]) for part in FROZEN)).weight(kernel)
        return dict(zip(held, stacked.split([each.places.shape[0] for each in held.values()]), strict=True))

    def parameters_of(self, policy: Mapping[str, str]) -> dict[str, nn.Parameter]:
        """The trained tensors that this policy's forward pass uses."""
        used = {f"{policy[unit.name]}/{self._owner[module]}" for unit in self.units for module in unit.modules}
        quantised = [stem.split("/") for stem in used if CATALOGUE[stem.partition("/")[0]].quantised]
        used |= {adapter for name, owner in quantised for adapter in self.adapters.of(name, owner)}
        return {name: tensor for name, tensor in self.parameters.items() if name.rpartition("/")[0] in used}

    def weights(self, policy: Mapping[str, str]) -> dict[str, Tensor]:
        """parameter name of the model → the weight that the policy's kernels make of it (fp32: the plain one; fp16: rounded to that).

        Layers of one kernel and width are quantised in one go: on a GPU a small model's time is the number of launches.
        """
        stacks: dict[tuple[str, int], dict[str, None]] = {}
        for unit in self.units:
            stacks.setdefault((policy[unit.name], unit.K), {}).update(dict.fromkeys(self._owner[module] for module in unit.modules))
        made: dict[tuple[str, str], Tensor] = {}
        for (name, _), owners in stacks.items():
            if CATALOGUE[name].quantised:
                rows = [self._weight(owner).shape[0] for owner in owners]
                stacked = fake_quantise(*self._quantiser_inputs(list(owners), CATALOGUE[name]))
                if not self.adapters.requantised:
                    stacked = stacked + self._shifts(list(owners), CATALOGUE[name])
                made |= {(owner, name): part for owner, part in zip(owners, stacked.split(rows), strict=True)}
            else:
                made |= {(owner, name): fake_quantise(self._weight(owner), CATALOGUE[name]) for owner in owners}
        return {f"{module}.weight": made[self._owner[module], policy[unit.name]] for unit in self.units for module in unit.modules}

    def __call__(
        self,
        policy: Mapping[str, str],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        activations: bool = True,
        weights: Mapping[str, Tensor] | None = None,
        cache: Any = None,
    ) -> Output:
        """What this policy's subnet says of windows input_ids [B, T]; attention_mask 0/1 [B, T]. By kind: see `passes.py`.

        activations: also quantise layers' inputs as the kernels do at run time. weights: the result of `weights(policy)` where the
        caller has it already. cache: a transformers cache, continued in place: with it a decoder goes token by token, as a package
        does (kernels that quantise activations per tensor then see one token at a time).
        """
        return self.trace(policy, input_ids, attention_mask, activations, weights, cache).output

    def trace(
        self,
        policy: Mapping[str, str],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        activations: bool = True,
        weights: Mapping[str, Tensor] | None = None,
        cache: Any = None,
        hidden: bool = False,
    ) -> Trace:
        """The same, and the subnet's hidden states if they are asked for."""
        effective = dict(self.weights(policy) if weights is None else weights)
        with self.quantised_inputs(policy if activations else None):
            return self.passed(effective, input_ids, attention_mask, cache, hidden)

    def passed(
        self,
        weights: Mapping[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        hidden: bool = False,
    ) -> Trace:
        """The model's pass with these weights in place of its own; inputs as they are, but within `quantised_inputs`."""
        from torch.func import functional_call

        arguments = self.passes.arguments(input_ids, attention_mask, hidden)
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        return self.passes.trace(functional_call(self.model, dict(weights), (), arguments, tie_weights=False), hidden)

    @contextmanager
    def quantised_inputs(self, policy: Mapping[str, str] | None, compiled: bool = False) -> Iterator[None]:
        """While this lasts, passes quantise inputs of layers as the policy's kernels do (None: not at all). compiled: a pass that torch
        compiles then serves all policies."""
        plain = self._activation_hooks(policy) if policy and not compiled else []
        hooks = self._chosen_hooks(policy) if compiled else plain
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _activation_hooks(self, policy: Mapping[str, str]) -> list[Any]:
        """One forward-pre-hook per linear whose kernel quantises its input. Layers fed the same tensor (q, k, v) share the work."""
        last: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

        def quantise(kernel: Kernel) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x, *rest = inputs
                seen = last.get(_grid(kernel))
                if seen is None or seen[0] is not x:
                    seen = last[_grid(kernel)] = (x, fake_quantise_activation(x, kernel))
                return (seen[1], *rest)

            return hook

        return [
            self.model.get_submodule(module).register_forward_pre_hook(quantise(kernel))
            for unit in self.units
            if unit.op == "MatMul" and (kernel := CATALOGUE[policy[unit.name]]).activation != "fp32"
            for module in unit.modules
        ]

    def _chosen_hooks(self, policy: Mapping[str, str] | None) -> list[Any]:
        """One on every linear, told by a number how its kernel quantises; what compiles it takes care that equal work is done once. It does
        not look at hooks again, so they are there also where nothing is quantised."""
        offered = (CATALOGUE[name] for unit in self.units for name in self.kernels[unit.name] if unit.op == "MatMul")
        ways = {_grid(kernel): kernel for kernel in offered if kernel.activation != "fp32"}
        places = {grid: place for place, grid in enumerate(ways)}
        linears = [unit for unit in self.units if unit.op == "MatMul"]
        chosen = [places.get(_grid(CATALOGUE[policy[unit.name]]), len(ways)) if policy else len(ways) for unit in linears]
        choices = torch.tensor(chosen, device=self.device)

        def quantise(row: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x, *rest = inputs
                return (fake_quantise_chosen(x, tuple(ways.values()), choices[row]), *rest)

            return hook

        return [
            self.model.get_submodule(module).register_forward_pre_hook(quantise(row))
            for row, unit in enumerate(linears)
            for module in unit.modules
        ]

    def teacher(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        """The full-precision model's output."""
        return self.teacher_trace(input_ids, attention_mask).output

    @torch.no_grad()
    def teacher_trace(self, input_ids: Tensor, attention_mask: Tensor | None = None, hidden: bool = False) -> Trace:
        """The same, and its hidden states if they are asked for."""
        return self.passes.trace(self.model(**self.passes.arguments(input_ids, attention_mask, hidden)), hidden)

    @torch.no_grad()
    def quantized(self, unit: Unit, kernel: Kernel) -> Quantized:
        """Codes of the whole unit, its modules' rows stacked: `affine.dequantize` of them is exactly what the forward pass uses.

        Raises InputError for pooled adapters, which no integer codes hold."""
        if not self.adapters.requantised:
            raise InputError(f"expected adapters that are rounded with the weights, got {self.adapters.kind}")
        return codes(*self._quantiser_inputs(unit.modules, kernel))

    def policy(self, kernel: str) -> Policy:
        """The uniform policy of a kernel name (see `kernels.uniform`)."""
        from toolchain.kernels import uniform

        return uniform(kernel, self.units, dict.fromkeys(name for names in self.kernels.values() for name in names))

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave. Raises InputError where a tensor is missing or has another shape."""
        arrays = dict(arrays)
        for module, owner in self._owner.items():  # a tied layer's adapter may come under either name
            for alias in [name for name in arrays if name.split("/")[1] == module != owner]:
                arrays.setdefault(alias.replace(f"/{module}/", f"/{owner}/"), arrays[alias])
        for name, parameter in self.parameters.items():
            if name not in arrays or arrays[name].shape != tuple(parameter.shape):
                got = f"shape {arrays[name].shape}" if name in arrays else "none"
                raise InputError(f"expected {name} of shape {tuple(parameter.shape)}, got {got}")
            parameter.data.copy_(torch.from_numpy(np.asarray(arrays[name])))
        stems = dict.fromkeys(name.rpartition("/")[0] for name in self.parameters)
        kept = {stem: [arrays.get(f"{stem}/frozen_{part}") for part in FROZEN] for stem in stems}
        self.frozen = {
            stem: Frozen(*(torch.from_numpy(np.asarray(array)).to(self.device) for array in parts))
            for stem, parts in kept.items()
            if all(array is not None for array in parts)
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """A copy of every trained tensor by the names of `parameters`, and of the frozen ones as frozen_places, frozen_low, frozen_high."""
        tensors: dict[str, Tensor] = dict(self.parameters)
        tensors |= {f"{stem}/frozen_{part}": getattr(held, part) for stem, held in self.frozen.items() for part in FROZEN}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
