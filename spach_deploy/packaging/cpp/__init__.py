"""A C++17 library that loads a bundle's plan, with a self-test, an example and a benchmark.

folder.py      the whole folder, written in one step, with model.txt and golden.bin: manifest and golden pack for C++
library/       the C++ sources, copied unchanged: the same for every bundle
"""
