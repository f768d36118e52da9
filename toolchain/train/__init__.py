"""Training: samplers, losses, the joint loop over supernet and meta-network with its checkpoints, and text a model writes itself.

Knows policies, costs and the supernet's forward pass; refuses to know ONNX and how costs were measured.
"""
