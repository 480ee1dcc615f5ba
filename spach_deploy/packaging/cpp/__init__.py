"""A C++17 library that loads a bundle's plan, with a self-test, an example and a benchmark.

model_file.py  model.txt: what the C++ code needs from the manifest
folder.py      the whole folder, written in one step, with golden.bin: the golden pack for C++
library/       the C++ sources, copied unchanged: the same for every bundle
"""
