"""Foreign checkpoints and names, one file per project."""
