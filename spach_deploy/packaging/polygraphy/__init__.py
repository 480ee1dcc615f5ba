"""A bundle's golden data in Polygraphy's formats, so that `polygraphy run` compares with the PyTorch reference.

folder.py    the whole folder, written in one step
scripts/     the data loader and the comparison, copied unchanged; they need NumPy and Polygraphy only
"""
