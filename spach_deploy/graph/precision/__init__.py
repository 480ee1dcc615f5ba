"""Half precision: measure the range of every tensor, give every tensor a type, emulate the typed graph in FP32.

ranges = measure_ranges(graph, batches, source="8 built-in photographs")       # ranges.py
typed = type_graph(graph, Precision.FP16, ranges)                              # typed_graph.py, by decision.py
rounded = rounded_graph(typed.model)                                           # rounding.py
"""
