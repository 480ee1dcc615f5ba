"""From a checkpoint to a bundle: the export, its steps, and when they run."""
