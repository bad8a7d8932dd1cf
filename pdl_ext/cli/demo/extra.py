"""How to install what the demo needs beside pdl_ext."""

__all__ = ["EXTRA_REQUIREMENT"]

EXTRA_REQUIREMENT = 'pip install "pdl_ext[demo]"'
