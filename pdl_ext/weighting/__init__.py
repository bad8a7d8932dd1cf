"""How a token's weight follows from its frequency."""

from pdl_ext.weighting.power_law import PowerLaw

__all__ = ["PowerLaw"]

# What pickles call it, and what loads them safely knows it by.
PowerLaw.__module__ = __name__
