"""A C++17 library that loads a bundle's plan, with a self-test, an example and a benchmark.

facts.py     what the manifest says, as model.txt, which the C++ side reads
golden.py    the golden pack as golden.bin
folder.py    the whole folder, written in one step
library/     the C++ sources, copied as they are: the same for every bundle
"""
