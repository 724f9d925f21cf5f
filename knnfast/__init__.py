"""Exact top-k retrieval faster than reading the data, and image generation conditioned on it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from knnfast._version import __version__

# Public names and where they live. Nothing is imported before it is used, so that a service that
# only searches never loads torch, and `import knnfast` costs milliseconds.
_PUBLIC = {
    "Batcher": "knnfast.search",
    "Database": "knnfast.database",
    "Index": "knnfast.search",
    "KNNDiffusion": "knnfast.pipeline",
    "ShardedIndex": "knnfast.search.distributed",
    "encoders": "knnfast.encoders",
    "faiss_reference": "knnfast.benchmark.faiss_reference",
    "faiss_api": "knnfast.faiss_api",
    "num_threads": "knnfast.search",
    "ops": "knnfast.ops",
    "reference": "knnfast.ops.reference",
    "search": "knnfast.search",
    "set_num_threads": "knnfast.search",
}
_MODULES = {"encoders", "faiss_api", "ops", "reference", "search"}

__all__ = ["__version__", *_PUBLIC]

# On PYTHONPATH a checkout keeps knnfast.kernels beside the package, as the folder `kernels`.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels" / "tiles.py").is_file():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'knnfast' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
