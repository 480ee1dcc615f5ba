"""Many bundles by one command: models times precisions times GPUs, each in a process of its own, one summary."""
