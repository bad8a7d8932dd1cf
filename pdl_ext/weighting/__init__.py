"""How a token's weight follows from its frequency."""

from pdl_ext.weighting.power_law import PowerLaw

__all__ = ["PowerLaw"]
