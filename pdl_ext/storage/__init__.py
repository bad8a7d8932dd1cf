"""Private: writes counts and checkpoints to files, and reads them back."""
