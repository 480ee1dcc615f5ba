"""Recordings of behaviour: what commands print, write and end with, to compare two versions of the package."""
