"""Validation: run a bundle's graph or engine, compare it with PyTorch in FP32, and report the result."""
