"""Quantization to INT8 and FP8: which layers, with which scales from calibration images, and the Q/DQ nodes for them.

sites.py        the layers that can be quantized, found in the FP32 graph
statistics.py   what their inputs look like, streamed over images: one pass, memory that does not grow
scales.py       from histograms and weights to scales: max, percentile, entropy, mse
equalization.py exact exchange of ranges between neighbouring weights, before scales are set
plan.py         which sites, with which scales: the record that the bundle keeps
qdq.py, outlier_migration.py   passes over graphs, each with a result (model, modified)
fake_quantization.py   the same in PyTorch, by which tolerances are derived; and bias correction, in both
sensitivity.py  what each layer costs, and the largest set that stays within a bound
"""
