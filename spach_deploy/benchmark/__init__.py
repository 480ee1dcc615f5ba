"""Benchmarks of a bundle's model on this machine: latency and numerical error of every runtime that can run it."""
