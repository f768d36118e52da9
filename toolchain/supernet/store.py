"""The supernet's folder: its layout, writing, reading back, and refusing what is damaged. numpy, safetensors and yaml; no torch.

    supernet.yaml                       what it is: source, kernels, sensitivities, training, sha256 of the files below. Written last.
    graph/  model/                      fp32 ONNX graph; the Hugging Face folder: written by the caller, not described here
    quantised/<kernel>.safetensors      <unit>/codes (packed, container bits), <unit>/scales, <unit>/zero_points
    adapters/<kernel>/                  PEFT: adapter_model.safetensors + adapter_config.json; bounds.safetensors: logarithms <module>/low,
                                        /high; start.safetensors: what the adapters are added to, where that is not the model's own
    adapters/shared/                    PEFT, if there are any: what the kernels of up to 4 bits add besides; active together with theirs
    meta_network.safetensors, calibration.safetensors and heldout.safetensors (tokens [n, T])

A tied embedding and head are stored once per kernel, under the first of the two units; the other finds it through `tied_to`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import DamagedFileError, InputError
from toolchain.files import inside, sha256, write_atomic
from toolchain.kernels import CATALOGUE, counterpart
from toolchain.quantize.affine import Quantized, groups
from toolchain.quantize.packing import pack, unpack
from toolchain.reading import read_yaml
from toolchain.spec import Kernel, Unit, Workload

DESCRIPTION = "supernet.yaml"
FORMAT = 2
SHARED = "shared"
"""What stands for a kernel's name where an adapter is common to several."""
_REMEDY = "train again: bittailor train"
_HASHED = ("quantised", "adapters", "meta_network.safetensors", "calibration.safetensors", "heldout.safetensors")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One safetensors file, atomically."""
    from safetensors.numpy import save

    write_atomic(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def write_quantised(folder: Path, kernel: Kernel, units: Mapping[str, Quantized]) -> None:
    """quantised/<kernel>.safetensors from unit → codes."""
    arrays = {}
    for name, quantized in units.items():
        arrays[f"{name}/codes"] = pack(quantized.codes, kernel.container_bits)
        arrays[f"{name}/scales"] = quantized.scales
        arrays[f"{name}/zero_points"] = quantized.zero_points
    write_arrays(folder / "quantised" / f"{kernel.name}.safetensors", arrays)


def write_adapter(
    folder: Path, kernel: str, layers: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any], embeddings: frozenset[str]
) -> None:
    """adapters/<kernel>/ from module → {A [r, K], B [N, r], optional low and high [N, G] and frozen_...}. PEFT keeps an embedding's pair
    transposed."""
    tensors: dict[str, np.ndarray] = {}
    bounds: dict[str, np.ndarray] = {}
    start: dict[str, np.ndarray] = {}
    for module, parts in layers.items():
        stem = f"base_model.model.{module}"
        if module in embeddings:
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = parts["B"].T, parts["A"].T
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = parts["A"], parts["B"]
        bounds |= {f"{module}/{part}": parts[part] for part in ("low", "high") if part in parts}
        start |= {f"{module}/{part}": array for part, array in parts.items() if part.startswith("frozen_")}
    target = folder / "adapters" / kernel
    write_arrays(target / "adapter_model.safetensors", tensors)
    write_arrays(target / "bounds.safetensors", bounds)
    write_arrays(target / "start.safetensors", start)
    write_atomic(
        target / "adapter_config.json", json.dumps({**config, "target_modules": sorted(layers)}, indent=1, sort_keys=True) + "\n"
    )


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """supernet.yaml, with the sha256 of every file of ours that is in the folder by now: call it last."""
    import yaml

    roots = [folder / name for name in _HASHED]
    paths = sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    write_atomic(
        folder / DESCRIPTION, yaml.safe_dump({"format": FORMAT, **description, "files": files}, sort_keys=False, width=120)
    )


@dataclass(frozen=True)
class SupernetFolder:
    """A supernet at rest. description: supernet.yaml as a dict."""

    directory: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> SupernetFolder:
        """Read supernet.yaml and check every file it names. Raises InputError if there is none, DamagedFileError if anything differs."""
        description = path / DESCRIPTION
        if not description.is_file():
            raise InputError(
                f"expected a supernet with {DESCRIPTION} in {path}, got none", "type: bittailor train MODEL --out SUPERNET"
            )
        try:
            data = read_yaml(inside(path, DESCRIPTION))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            files = {str(name): str(digest) for name, digest in data["files"].items()}
            _typed(data)
            given = {name for names in data["kernels"].values() for name in names}
            needed = {f"quantised/{name}.safetensors" for name in given if CATALOGUE[name].quantised}
            if missing := sorted((needed | {"meta_network.safetensors"}) - set(files)):
                raise ValueError(f"no {missing[0]} in its list")
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedFileError(f"expected a supernet's description in {description}, got: {error!r}", _REMEDY) from error
        for name, digest in files.items():
            file = inside(path, name)
            if not file.is_file():
                raise DamagedFileError(f"expected {file}, which {description} names, got no such file", _REMEDY)
            if sha256(file) != digest:
                raise DamagedFileError(f"expected {file} as it was written (sha256 {digest[:12]}…), got another content", _REMEDY)
        return cls(path, data)

    @property
    def graph_directory(self) -> Path:
        return self.directory / "graph"

    @property
    def model_directory(self) -> Path:
        return self.directory / "model"

    @property
    def meta_network(self) -> Path:
        return self.directory / "meta_network.safetensors"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Every kernel that some unit was given, fp32 included, in catalogue order."""
        given = {name for names in self.description["kernels"].values() for name in names}
        return tuple(name for name in CATALOGUE if name in given)

    @property
    def sensitivity(self) -> dict[str, dict[str, float]]:
        """unit → kernel → loss over the reference (nats per token for decoders), measured after training."""
        return {
            unit: {kernel: float(loss) for kernel, loss in row.items()} for unit, row in self.description["sensitivity"].items()
        }

    def quantized(self, unit: Unit, kernel: Kernel) -> Quantized:
        """The trained codes of a unit; for another provider's kernel those trained for its counterpart, the scales rounded as it has them.

        Raises InputError for a kernel it was not given, DamagedFileError for tensors of another shape.
        """
        names = self.description["kernels"].get(unit.name, ())
        asked, trained = kernel, counterpart(kernel.name, names)
        if not trained or not kernel.quantised:
            raise InputError(f"expected a quantised kernel among {', '.join(names)} for unit {unit.name!r}, got {kernel.name!r}")
        kernel = CATALOGUE[trained]
        from safetensors import SafetensorError, safe_open

        path = self.directory / "quantised" / f"{kernel.name}.safetensors"
        G, width = groups(unit.K, kernel)
        try:
            with safe_open(path, framework="numpy") as stored:
                stem = unit.name if f"{unit.name}/codes" in stored.keys() else unit.tied_to  # noqa: SIM118 - not a mapping
                packed, scales, zero_points = (stored.get_tensor(f"{stem}/{part}") for part in ("codes", "scales", "zero_points"))
            expected = ((unit.N, G, -(-width * kernel.container_bits // 8)), (unit.N, G), (unit.N, G))
            kinds = (packed.dtype, scales.dtype, zero_points.dtype)
            if (packed.shape, scales.shape, zero_points.shape) != expected or kinds != (np.uint8, np.float32, np.uint8):
                raise ValueError(f"shapes {packed.shape}, {scales.shape}, expected {expected[0]}, {expected[1]}")
        except (OSError, SafetensorError, ValueError) as error:
            raise DamagedFileError(f"expected codes of unit {unit.name!r} in {path}, got: {error}", _REMEDY) from error
        scales = scales.astype(asked.float_type).astype(np.float32)
        return Quantized(unpack(packed, kernel.container_bits, width), scales, zero_points, unit.K)

    def trained(self) -> dict[str, np.ndarray]:
        """What `Supernet.arrays` gave, for `Supernet.load`: "kernel/module/part". Raises DamagedFileError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return self._trained(load_file)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DamagedFileError(f"expected adapters in {self.directory / 'adapters'}, got: {error}", _REMEDY) from error

    def _trained(self, load_file: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        out = {}
        for kernel in (*self.kernels, SHARED):
            folder = self.directory / "adapters" / kernel
            if not folder.is_dir():
                continue
            for name, array in load_file(folder / "adapter_model.safetensors").items():
                module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
                if not part:
                    raise ValueError(f"the tensor {name!r}, which is no adapter's")
                swapped = {"embedding_A": "B", "embedding_B": "A"}
                out[f"{kernel}/{module}/{swapped.get(part, part[0])}"] = array.T if part in swapped else array
            for file in ("bounds.safetensors", "start.safetensors"):
                out |= {f"{kernel}/{name}": array for name, array in load_file(folder / file).items()}
        return out

    def calibration(self) -> np.ndarray:
        """int64 [n, T] token windows the sensitivities were measured on."""
        return self._tokens("calibration")

    def heldout(self) -> np.ndarray:
        """int64 [n, T] token windows that no step saw. Raises DamagedFileError if the supernet was written without."""
        return self._tokens("heldout")

    def _tokens(self, name: str) -> np.ndarray:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.directory / f"{name}.safetensors"
        try:
            tokens = load_file(path)["tokens"]
            if tokens.ndim != 2 or tokens.dtype != np.int64 or tokens.size == 0 or tokens.min() < 0:
                raise ValueError(f"{tokens.dtype} {tokens.shape}")
            return tokens
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DamagedFileError(f"expected token windows in {path}, got: {error}", _REMEDY) from error


def _typed(data: Mapping[str, Any]) -> None:
    """ValueError unless a description holds what is read from it."""
    for key in ("kernels", "sensitivity", "training"):
        if not isinstance(data[key], Mapping):
            raise ValueError(f"no {key}")
    for unit, names in data["kernels"].items():
        if not isinstance(names, list) or not names or any(name not in CATALOGUE for name in names):
            raise ValueError(f"kernels {names!r} of unit {unit!r} instead of a list of this version's")
    for unit, row in data["sensitivity"].items():
        if not isinstance(row, Mapping) or any(type(loss) not in (int, float) for loss in row.values()):
            raise ValueError(f"sensitivity {row!r} of unit {unit!r} instead of a number for each kernel")
    for key in ("rank", "alpha"):
        if type(data[key]) not in (int, float) or not 0 < data[key] < 1 << 20:
            raise ValueError(f"{key} {data[key]!r} instead of a positive number")
    if "workload" in data["training"]:
        Workload.parse(str(data["training"]["workload"]))
