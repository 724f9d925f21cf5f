"""The M/D/c queue that a service under load stands beside."""

from __future__ import annotations

import heapq

import numpy as np


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Arrival times of a Poisson process."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, max(1, int(rate * seconds))))


def queue(arrivals: np.ndarray, service: float, servers: int) -> np.ndarray:
    """Latencies of an M/D/c queue, first come first served, for these arrivals."""
    free = [0.0] * servers
    latencies = np.empty(len(arrivals))
    for i, arrival in enumerate(arrivals):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        latencies[i] = end - arrival
    return latencies


def service_under_load(spans: np.ndarray, servers: int) -> float:
    """Median seconds of the searches that found a server free; NaN where none did."""
    begins, ends = np.sort(spans, axis=0).T
    others = np.searchsorted(begins, spans[:, 0]) - np.searchsorted(ends, spans[:, 0], "right")
    free = (spans[:, 1] - spans[:, 0])[others < servers]
    return float(np.median(free)) if len(free) else float("nan")
