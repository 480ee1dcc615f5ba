"""The steps of an export: each is a function that takes results of earlier steps and returns one typed result."""
