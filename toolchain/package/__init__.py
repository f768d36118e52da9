"""Supernet or model + policy → ONNX package (`export`); its manifest, read and verified (`manifest`); text from it (`generate`)."""
