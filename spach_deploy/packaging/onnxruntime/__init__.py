"""A folder that an ONNX Runtime application loads, with a program in Python and one in C++ that prove it on the spot.

folder.py    the whole folder, written in one step
templates/   the programs and the README, which need ONNX Runtime and NumPy only
"""
