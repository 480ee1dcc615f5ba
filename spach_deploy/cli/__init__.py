"""Commands: options.py defines each option once, one file per command."""
