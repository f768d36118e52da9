"""Graph + policy + weights → a package folder, whole or not at all: the graph's files, their data, tokenizer, manifest.yaml.

Owns the order of things: tensors are streamed to a temporary folder, the manifest is written last, the folder is renamed. The same
inputs give the same bytes: no date, no path, no random name is in a package. Refuses to know budgets' origin and measuring.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toolchain
from toolchain.errors import DamagedFileError
from toolchain.files import replace_folder
from toolchain.graph.assemble import Weights, assemble
from toolchain.graph.model import Graph
from toolchain.kernels import mean_bits
from toolchain.package.manifest import FILE_NAME, Package, open_package, write_manifest
from toolchain.reading import read_json
from toolchain.session import PROVIDER_OPTIONS, SESSION_OPTIONS
from toolchain.spec import CUDA, Budget, Cost, Policy, Workload

_GENAI, _GENAI_PROVIDERS = "genai_config.json", {CUDA: "cuda"}
# What onnxruntime takes by name alone and onnxruntime-genai by number alone.
_GENAI_NUMBERS = {("arena_extend_strategy", "kSameAsRequested"): "1"}


def export_package(
    graph: Graph,
    policy: Policy,
    weights: Weights,
    out: Path,
    *,
    workload: Workload,
    device: str,
    provider: str,
    budget: Budget | None,
    predicted: Cost | None,
    gap_to_optimum: float | None,
    runtime: str,
    evidence: Mapping[str, Any],
) -> Package:
    """Write the package and open it again, verified. `evidence`: how the weights came about (text, training) and the table's reference.

    Raises InputError if `out` exists and is not an earlier package.
    """
    with replace_folder(out, FILE_NAME) as folder:
        assemble(graph, policy, weights, folder)
        for path in graph.companions():
            shutil.copyfile(path, folder / path.name)
        _tell_genai(folder / _GENAI, provider)
        manifest = {
            "model": {
                "source": Path(graph.source).name,
                "architecture": graph.architecture,
                "kind": graph.kind,
                "fingerprint": graph.fingerprint,
                "vocabulary": graph.vocabulary,
                "context": graph.context,
            },
            "device": device,
            "provider": provider,
            "workload": str(workload),
            "budget": budget.to_json() if budget else None,
            "predicted": predicted.to_json() if predicted else None,
            "gap_to_optimum": None if gap_to_optimum is None else round(gap_to_optimum, 9),
            "mean_bits": round(mean_bits(policy, graph.units), 4),
            "policy": dict(policy.items()),
            "session_options": dict(SESSION_OPTIONS),
            "provider_options": PROVIDER_OPTIONS.get(provider, {}),
            **evidence,
            "versions": {"bittailor": toolchain.__version__, "runtime": runtime},
        }
        write_manifest(folder, manifest, graph.units)
    return open_package(out)


def _tell_genai(path: Path, provider: str) -> None:
    """onnxruntime-genai runs a package on the providers that its own file names; a graph's names none, which is the CPU."""
    if provider not in _GENAI_PROVIDERS or not path.is_file():
        return
    try:
        config = read_json(path)
        options = {name: _GENAI_NUMBERS.get((name, value), value) for name, value in PROVIDER_OPTIONS.get(provider, {}).items()}
        config["model"]["decoder"].setdefault("session_options", {})["provider_options"] = [{_GENAI_PROVIDERS[provider]: options}]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"expected a decoder's session options in {path.name} of the graph, got: {error!r}") from error
    path.write_text(json.dumps(config, indent=4) + "\n")
