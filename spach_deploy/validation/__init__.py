"""Comparison, tolerances, validation of bundles and their files, reports."""
