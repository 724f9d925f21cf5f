"""The fused ops, one file each; `reference` holds their FP64 definitions."""

# Imported eagerly: an op and its file share a name, and the function must be what stays bound.
from knnfast.ops.neighbour_attention import Unfolded, fold_neighbours, neighbour_attention
from knnfast.ops.reference import Folded, transition_weights
from knnfast.ops.topk import topk
from knnfast.ops.transition import sample_head, sample_prior, transition_step
from knnfast.ops.transition_loss import transition_loss

__all__ = [
    "Folded",
    "Unfolded",
    "fold_neighbours",
    "neighbour_attention",
    "sample_head",
    "sample_prior",
    "topk",
    "transition_loss",
    "transition_step",
    "transition_weights",
]
