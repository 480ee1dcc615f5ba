"""A bundle's golden data in Polygraphy's own forms, so that `polygraphy run` compares with what PyTorch answered.

folder.py    the whole folder, written in one step
scripts/     the data loader and the comparison, copied as they are: they need NumPy and Polygraphy, nothing of ours
"""
