"""Quality of an ONNX folder on stock onnxruntime: perplexity of decoders, fidelity of encoders. Refuses to know devices and budgets."""

from toolchain.evaluate.fidelity import Fidelity, fidelity
from toolchain.evaluate.perplexity import perplexity

__all__ = ["Fidelity", "fidelity", "perplexity"]
