"""Power-Law Decay Loss for PyTorch (arXiv 2505.16900): cross-entropy that weighs each target by its rarity."""

from pdl_ext import functional, reference
from pdl_ext._version import __version__ as __version__
from pdl_ext.frequency import TokenFrequency
from pdl_ext.functional import RowStats
from pdl_ext.labels import count_labels
from pdl_ext.loss import PDLLoss
from pdl_ext.weighting import PowerLaw

__all__ = ["PDLLoss", "PowerLaw", "RowStats", "TokenFrequency", "count_labels", "functional", "reference"]
