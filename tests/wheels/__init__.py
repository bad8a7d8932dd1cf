"""Builds, checks and tests wheels: `python tests/wheels --help`."""
