"""The supernet: one frozen model, per kernel frozen weights, a LoRA adapter and bounds, and the folder they are kept in.

Knows kernels' numerics (`quantize/`); refuses to know ONNX, devices, and who chose a policy. `store.py` needs no torch.
"""
