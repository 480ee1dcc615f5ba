"""Steps of an ensemble, for Triton's Python backend.

Each module here is copied into a repository as model.py, as it is: it imports nothing of spach-deploy, only NumPy,
Pillow and what the server itself brings.
"""
