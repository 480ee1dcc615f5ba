"""Half precision as a policy: ranges measured in FP32, a typed graph, and a proof that rounds every tensor.

ranges = measure_ranges(graph, batches, source="8 built-in photographs")       # ranges.py
typed = type_graph(graph, Precision.FP16, ranges)                              # half.py
proof = prove_policy(graph, typed.model, batches)                              # rounding.py
"""
