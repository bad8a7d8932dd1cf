"""Counts corpora, on disk, in stores and in memory: `count_corpus`, for every format and for text."""

from pdl_ext.corpus.counting import Progress, count_corpus
from pdl_ext.provenance import Provenance, Shard, TargetPolicy

__all__ = ["Progress", "Provenance", "Shard", "TargetPolicy", "count_corpus"]
