"""`bittailor evaluate`: a package's or model's quality on the user's text, measured through the runtime that will serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import InputError
from toolchain.evaluate.fidelity import fidelity
from toolchain.evaluate.perplexity import perplexity
from toolchain.graph.model import DESCRIPTION, Graph
from toolchain.hardware import has_provider, load, thread_count
from toolchain.kernels import CATALOGUE
from toolchain.package.manifest import is_package, open_package
from toolchain.progress import note
from toolchain.session import cache_slots, is_encoder_decoder, open_session
from toolchain.spec import CPU
from toolchain.text import documents, load_tokenizer, record, separator_id, windows


def evaluate(what: str, text: Sequence[Path], window: int, reference: str | None) -> dict[str, Any]:
    """{"perplexity", "tokens"} of a decoder or {"cosine", "relative_mse", "tokens"} of an encoder, with the text it was measured on."""
    if window < 2:
        raise InputError(f"expected windows of 2 tokens or more, got {window}")
    threads = thread_count(load("local"))
    with _folder(what) as directory:
        if is_encoder_decoder(directory):
            raise InputError(
                f"expected a decoder or an encoder to evaluate, got the encoder-decoder {what}", "type: bittailor run PACKAGE TEXT"
            )
        provider = serving_provider(directory)
        decoder = bool(cache_slots(open_session(directory, threads, provider)))
        context = _context(directory)
        if window > context:
            raise InputError(
                f"expected windows of at most {context} tokens, the model's context, got {window}", f"type: --window {context}"
            )
        tokens = windows(load_tokenizer(directory), documents(text), window, separator_id(directory), framed=not decoder)
        description = record(", ".join(path.name for path in text), documents(text), tokens)
        result: dict[str, Any] = {
            "what": what,
            "text": description.description,
            "text_sha256": description.sha256,
            "window": window,
        }
        if decoder:
            stepwise = _two_phases(directory)
            value, count = perplexity(directory, tokens, threads, stepwise, provider)
            how = {"how": "token by token, since the package prefills with other kernels than it decodes with"} if stepwise else {}
            return {**result, "perplexity": value, "tokens": count, **how}
        with _folder(reference or _source_of(directory)) as reference_directory:
            seen = fidelity(directory, reference_directory, tokens, threads, provider)
        return {**result, "cosine": seen.cosine, "relative_mse": seen.relative_mse, "tokens": seen.tokens}


def serving_provider(directory: Path) -> str:
    """The provider that a package was made for, if the runtime here has it; else the CPU's, and a note that says so."""
    made_for = open_package(directory, verify=False).provider if is_package(directory) else CPU
    here = has_provider(made_for)
    if here.usable:
        return made_for
    note(f"bittailor: made for {made_for}, runs on the CPU instead: {here.reason}")
    return CPU


@contextmanager
def _folder(what: str) -> Iterator[Path]:
    """A folder with model.onnx: the package itself, or the fp32 graph built from a model."""
    if is_package(Path(what)):
        yield open_package(Path(what)).directory
        return
    if (Path(what) / DESCRIPTION).is_file():  # a graph is there already: nothing of the training stack is needed
        yield Graph.open(Path(what)).directory
        return
    from toolchain.commands.workflow import opened

    with opened(what) as source:
        yield source.graph.directory


def _context(directory: Path) -> int:
    if is_package(directory):
        return open_package(directory, verify=False).context
    return Graph.open(directory).context


def _two_phases(directory: Path) -> bool:
    return is_package(directory) and any(CATALOGUE[name].prefill for name in open_package(directory, verify=False).policy.values())


def _source_of(directory: Path) -> str:
    if not is_package(directory):
        raise InputError(
            "expected a package to compare with its fp32 model, got the model itself", "type: --reference MODEL to compare it"
        )
    name = str(open_package(directory, verify=False).data["model"]["source"])
    if not Path(name).exists():
        raise InputError(f"expected the encoder's fp32 model {name!r} to compare with, found none here", "type: --reference MODEL")
    return name
