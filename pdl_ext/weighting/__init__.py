"""How a token's weight is computed from its frequency: one file for each weighting."""

from pdl_ext.weighting.adaptive import Adaptive
from pdl_ext.weighting.base import Weighting
from pdl_ext.weighting.class_balanced import ClassBalanced
from pdl_ext.weighting.face import Face
from pdl_ext.weighting.power_law import PowerLaw
from pdl_ext.weighting.uniform import Uniform

__all__ = ["Adaptive", "ClassBalanced", "Face", "PowerLaw", "Uniform", "Weighting"]

# The module name in pickles, and in the list of classes that are safe to load.
for _weighting in (Adaptive, ClassBalanced, Face, PowerLaw, Uniform, Weighting):
    _weighting.__module__ = __name__
