"""A package's quality on a named text as limits of a check: perplexity over the reference's, or an encoder's fidelity to it.

Runs on this machine's onnxruntime, without torch where the reference is a package or a graph; for a device elsewhere the numbers are this
machine's, and the verdict says so. On that text they are exact, so there is nothing that could not be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.check import OVER, WITHIN
from toolchain.commands import scoring
from toolchain.errors import InputError
from toolchain.graph.build import EMBEDDED
from toolchain.package.manifest import Package, is_package
from toolchain.spec import Verdict


@dataclass(frozen=True)
class QualityLimits:
    """max_perplexity_ratio: of decoders; min_fidelity: mean cosine, of encoders. text: what both are measured on.

    reference: a package, the graph/ folder of a supernet, or a MODEL (which needs torch); "": the model that the package was cut from.
    """

    text: tuple[Path, ...] = ()
    max_perplexity_ratio: float | None = None
    min_fidelity: float | None = None
    reference: str = ""
    window: int = 256

    @property
    def given(self) -> bool:
        return self.max_perplexity_ratio is not None or self.min_fidelity is not None

    def refuse_nonsense(self, package: Package) -> None:
        """Raise InputError for limits that this package cannot be held to; before anything is measured."""
        if not self.given:
            if self.text or self.reference:
                raise InputError("expected a limit on quality beside --text or --reference, got none", _example(package))
            return
        if not self.text:
            raise InputError("expected --text FILE beside a limit on quality, got none", _example(package))
        wrong = {
            "decoder": ("--min-fidelity", self.min_fidelity),
            "encoder": ("--max-perplexity-ratio", self.max_perplexity_ratio),
        }
        if package.kind not in wrong:
            raise InputError(f"expected a decoder or an encoder for a limit on quality, got an {package.kind}", "leave it out")
        option, value = wrong[package.kind]
        if value is not None:
            raise InputError(f"expected a limit that this {package.kind} can be held to, got {option}", _example(package))
        if self.max_perplexity_ratio is not None and not 0 < self.max_perplexity_ratio < float("inf"):
            raise InputError(f"expected a positive --max-perplexity-ratio, got {self.max_perplexity_ratio}", _example(package))
        if self.min_fidelity is not None and not 0 < self.min_fidelity <= 1:
            raise InputError(f"expected --min-fidelity above 0 and at most 1, got {self.min_fidelity}", _example(package))


def _example(package: Package) -> str:
    limit = "--min-fidelity 0.98" if package.kind == "encoder" else "--max-perplexity-ratio 1.1"
    return f"type for example: {limit} --text FILE"


def hold_quality(limits: QualityLimits, package: Package, elsewhere: bool) -> list[Verdict]:
    """One verdict for the limit that is given, none without. Raises InputError where text or reference is no good."""
    if not limits.given:
        return []
    reference = limits.reference or _source(package)
    text: Sequence[Path] = limits.text
    context = int(package.data["model"]["context"])
    window = min(limits.window, context)
    where = ", on this machine" if elsewhere else ""
    seen = scoring.evaluate(str(package.directory), text, window, reference)
    on = f"on {seen['tokens']} tokens of {seen['text']} (sha256 {seen['text_sha256'][:12]}){where}"
    if limits.min_fidelity is not None:
        verdict = WITHIN if seen["cosine"] >= limits.min_fidelity else OVER
        reason = f"a lower limit: mean cosine to {Path(reference).name} {on}"
        return [Verdict("fidelity", limits.min_fidelity, seen["cosine"], seen["cosine"], seen["cosine"], verdict, reason)]
    assert limits.max_perplexity_ratio is not None
    other = scoring.evaluate(reference, text, window, None)
    if other.get("perplexity") is None or other["tokens"] != seen["tokens"]:
        raise InputError(
            f"expected a reference that reads the text as the package does, got {reference}", "give the model that it was cut from"
        )
    ratio = seen["perplexity"] / other["perplexity"]
    verdict = WITHIN if ratio <= limits.max_perplexity_ratio else OVER
    reason = f"perplexity {seen['perplexity']:.2f} over {other['perplexity']:.2f} of {Path(reference).name} {on}"
    return [Verdict("perplexity_ratio", limits.max_perplexity_ratio, ratio, ratio, ratio, verdict, reason)]


def _source(package: Package) -> str:
    """The model that the package was cut from, if it is here."""
    name = str(package.data["model"]["source"])
    if is_package(Path(name)) or Path(name).is_dir() or name == EMBEDDED:
        return name
    raise InputError(
        f"expected the fp32 model {name!r} that the package was cut from to compare with, found none here",
        "type: --reference MODEL (or an fp32 package, or a supernet's graph/ folder, which need no torch)",
    )
