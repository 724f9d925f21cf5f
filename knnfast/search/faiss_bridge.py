"""Indexes from and to FAISS: Flat, IDMap over it, and the FP16 scalar quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from knnfast._checks import hint

MOST = 65520  # from here on FP16 rounds to infinity


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"FAISS is not installed: {hint('faiss')}") from error
    return faiss


def from_faiss(given: Any) -> Any:
    """An `Index` with the rows, ids and metric of a FAISS flat index.

    Raises: TypeError for an index that does not hold its rows flat; ValueError for a row that does
        not fit into FP16, or ids that are negative or not unique.
    """
    from knnfast.search.index import Index

    faiss = _faiss()
    if not isinstance(given, faiss.Index):
        raise TypeError(f"index must be a faiss.Index, got {type(given).__name__}")
    index = faiss.downcast_index(given)
    ids = None
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map)
        index = faiss.downcast_index(index.index)
    quantized = isinstance(index, faiss.IndexScalarQuantizer)
    half = quantized and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    if not isinstance(index, faiss.IndexFlat) and not half:
        raise TypeError(f"from_faiss takes Flat, IDMap and SQ-fp16, got {type(index).__name__}")
    metrics = {faiss.METRIC_INNER_PRODUCT: "ip", faiss.METRIC_L2: "l2"}
    if index.metric_type not in metrics:
        raise TypeError(f"from_faiss takes inner product and L2, got metric {index.metric_type}")
    ours = Index(index.d, metric=metrics[index.metric_type])
    step = max(1, (64 << 20) // (4 * index.d))
    for first in range(0, index.ntotal, step):
        rows = index.reconstruct_n(first, min(step, index.ntotal - first))
        if not (fits := (abs(rows) < MOST).all(1)).all():  # not so of NaN
            raise ValueError(
                f"index: row {first + int(fits.argmin())} holds NaN or a value beyond ±65504 (FP16)"
            )
        ours.add(rows, None if ids is None else ids[first : first + step])
    return ours


def to_faiss(index: Any) -> Any:
    """A FAISS IndexFlat with the index's FP16 rows, in an IndexIDMap2 unless ids are 0, 1, 2...

    Nobody may remove rows meanwhile.

    Raises: ValueError for cosine, which FAISS has no metric for.
    """
    faiss = _faiss()
    if index.metric == "cosine":
        raise ValueError("to_faiss: FAISS has no cosine metric; normalise the rows and use ip")
    make = faiss.IndexFlatIP if index.metric == "ip" else faiss.IndexFlatL2
    ids = index.ids
    flat = make(index.dim)
    plain = np.array_equal(ids, np.arange(len(ids)))
    theirs = flat if plain else faiss.IndexIDMap2(flat)
    step = max(1, (64 << 20) // (4 * index.dim))
    for first in range(0, len(ids), step):
        part = ids[first : first + step]
        rows = index.vectors(part).astype(np.float32)
        theirs.add(rows) if plain else theirs.add_with_ids(rows, part)
    if not plain:
        flat.this.disown()  # the map owns it now
        theirs.own_fields = True
    return theirs
