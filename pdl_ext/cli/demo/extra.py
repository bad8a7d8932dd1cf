"""How to install the demo's further requirements."""

__all__ = ["EXTRA_REQUIREMENT"]

EXTRA_REQUIREMENT = 'pip install "pdl_ext[demo]"'
