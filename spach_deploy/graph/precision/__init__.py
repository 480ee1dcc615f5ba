"""Half precision as a policy: ranges measured in FP32, a typed graph, and what it computes with every tensor rounded.

ranges = measure_ranges(graph, batches, source="8 built-in photographs")       # ranges.py
typed = type_graph(graph, Precision.FP16, ranges)                              # typed_graph.py
twin = rounded_graph(typed.model)                                              # rounding.py
"""
