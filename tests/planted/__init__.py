"""Faults planted in exported graphs, and harmless variants of them, to measure what a bisection finds."""
