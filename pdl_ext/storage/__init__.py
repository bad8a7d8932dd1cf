"""Private: how counts and checkpoints are written to files and read back."""
