"""Helpers that every other package may import: errors, files, processes, machine, versions, progress, metrics."""
