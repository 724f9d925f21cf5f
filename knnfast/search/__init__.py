"""Exact top-k over resident FP16 rows. Imports without torch."""

from knnfast.search.batcher import Batcher
from knnfast.search.index import DamagedFile, Index, Plan, num_threads, set_num_threads

__all__ = ["Batcher", "DamagedFile", "Index", "Plan", "num_threads", "set_num_threads"]
