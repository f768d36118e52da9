"""Hugging Face model → fp32 ONNX graph with its units marked; policy → kernels in the graph; one-unit graphs for the profiler."""
