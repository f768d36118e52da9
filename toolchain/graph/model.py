"""`Graph`: an fp32 ONNX model in a folder with its units marked (`graph.json`), and read access to the units' weights.

Owns the layout of that folder. Refuses to know how the graph was made (`build.py`) and what kernels will replace the units.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np

from toolchain.errors import DamagedFileError
from toolchain.files import inside, write_atomic
from toolchain.reading import read_json
from toolchain.session import MODEL_FILES
from toolchain.spec import Unit

DESCRIPTION = "graph.json"
_COMPANIONS = (
    *("tokenizer*", "*tokens*.json", "vocab*", "merges.txt", "*.model", "chat_template*"),
    *("config.json", "generation_config.json", "genai_config.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class Graph:
    """kind "decoder" has KV-cache inputs and logits over the vocabulary; "encoder" has neither; "encoder-decoder" is three files
    (`session.MODEL_FILES`), in each of which a unit's node and weight have the same names. `context` is the longest sequence, of an
    encoder-decoder the longest source and the longest target; `layers` are then its decoder's, `encoder_layers` its encoder's.

    `source` is what the user typed; `fingerprint` is a sha256 over the config and the weights; `inputs` are the graph's inputs in order.
    """

    directory: Path
    units: tuple[Unit, ...]
    kind: str
    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    context: int
    inputs: tuple[str, ...]
    source: str
    fingerprint: str
    encoder_layers: int = 0

    @classmethod
    def open(cls, directory: Path) -> Graph:
        """Read the folder back. Raises DamagedFileError."""
        try:
            data = read_json(inside(directory, DESCRIPTION))
            units = tuple(Unit(**{**unit, "modules": tuple(unit["modules"])}) for unit in data.pop("units"))
            inputs = tuple(data.pop("inputs"))
            return _typed(cls(directory=directory, units=units, inputs=inputs, **data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"expected a graph folder with {DESCRIPTION} in {directory}, got {error}") from error

    def save(self) -> None:
        data = asdict(self)
        data.pop("directory")
        write_atomic(self.directory / DESCRIPTION, json.dumps(data, indent=1) + "\n")

    def companions(self) -> list[Path]:
        """Files that a package carries besides the model: tokenizer, generation settings and licence, by the names they have; what else
        happens to lie in the folder is not published. Raises InputError for a link out of the folder: what it leads to would be."""
        names = (path.name for path in self.directory.iterdir() if path.is_file())
        return sorted(inside(self.directory, name) for name in names if any(fnmatchcase(name, known) for known in _COMPANIONS))

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the folder's ONNX graphs."""
        return MODEL_FILES[self.kind]

    @property
    def attention_width(self) -> int:
        """Heads × head width, as the output projection takes it in: not always the hidden size (Mistral-Nemo's is 4096 of 5120)."""
        return next((unit.K for unit in self.units if unit.name.endswith((".attn.o_proj", "Attention.o"))), self.hidden)

    def cache_bytes_per_layer(self, positions: int, float_type: str = "float32") -> int:
        """Bytes of one layer's keys and values with room for so many positions; 0 for an encoder, which has no cache.

        An encoder-decoder keeps those of the source and of what it has generated: together they are a decoder's positions.
        """
        return 2 * self.kv_heads * self.head_dim * np.dtype(float_type).itemsize * positions if self.kind != "encoder" else 0

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def weight(self, unit: Unit) -> np.ndarray:
        """float32 [N, K]: one row per output of a linear, one row per token of an embedding."""
        return np.ascontiguousarray(self._rows(unit), dtype=np.float32)

    def first_row(self, unit: Unit) -> np.ndarray:
        """float32 [K]: the first row of `weight`, without reading the others."""
        return np.ascontiguousarray(self._rows(unit)[0], dtype=np.float32)

    def _rows(self, unit: Unit) -> np.ndarray:
        from toolchain.graph.external import load_array

        if unit.weight not in self._stored[0]:
            raise DamagedFileError(f"expected the weight {unit.weight!r} of unit {unit.name!r} in {self.directory}, found none")
        array = load_array(self._stored[0][unit.weight], self.directory)
        rows = array if unit.weight in self._stored[1] else array.T
        if rows.shape != (unit.N, unit.K) or rows.dtype.kind != "f":
            raise DamagedFileError(
                f"expected {unit.N}x{unit.K} floats for unit {unit.name!r} in {self.directory}, got {rows.dtype} {rows.shape}"
            )
        return rows

    @cached_property
    def _stored(self) -> tuple[dict, set[str]]:
        """(name → initializer, names of those that a Gather reads as they are: one row per token). The others are [K, N].

        Of a tied pair one reads the other's through a Transpose: which of them, the builders do not agree.
        """
        from toolchain.graph.external import read_model

        models = [read_model(self.directory, name) for name in self.files]
        tensors = {tensor.name: tensor for model in models for tensor in model.graph.initializer}
        return tensors, {
            node.input[0] for model in models for node in model.graph.node if node.op_type == "Gather" and len(node.input)
        }


_LARGEST = 1 << 40
"""Of sizes: no layer is wider, and no sum of them overflows."""


def _typed(graph: Graph) -> Graph:
    """The graph, if its fields and its units' hold what they should. Raises ValueError."""
    texts = [(name, getattr(graph, name)) for name in ("kind", "architecture", "source", "fingerprint")]
    texts += [("inputs", name) for name in graph.inputs]
    sizes = [(name, getattr(graph, name), 1) for name in ("layers", "kv_heads", "head_dim", "hidden", "vocabulary", "context")]
    sizes.append(("encoder_layers", graph.encoder_layers, 0))
    for unit in graph.units:
        texts += [(name, getattr(unit, name)) for name in ("name", "op", "role", "node", "weight", "tied_to", "side")]
        texts += [("modules", name) for name in unit.modules]
        sizes += [("K", unit.K, 1), ("N", unit.N, 1)]
    for name, value in texts:
        if not isinstance(value, str):
            raise ValueError(f"{name} {value!r} instead of text")
    for name, value, least in sizes:
        if type(value) is not int or not least <= value <= _LARGEST:
            raise ValueError(f"{name} {value!r} instead of a whole number from {least}")
    if graph.kind not in MODEL_FILES:
        raise ValueError(f"kind {graph.kind!r} instead of one of {', '.join(MODEL_FILES)}")
    names = [unit.name for unit in graph.units]
    if not names or len(set(names)) < len(names):
        raise ValueError("no units, or two of one name")
    for unit in graph.units:
        if unit.op not in ("MatMul", "Gather") or (unit.tied_to and unit.tied_to not in names):
            raise ValueError(f"unit {unit.name!r} with the op {unit.op!r}, tied to {unit.tied_to!r}")
    return graph
