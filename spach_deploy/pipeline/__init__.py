"""The export from a checkpoint to a bundle: its steps, their scheduling, its cache, and exports of many models."""
