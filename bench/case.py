"""A case: one op at one shape, with everything that run.py needs to measure and to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from knnfast.benchmark.timing import Choice

Call = Callable[[], Any]


@dataclass
class Rival:
    """A peer's way to the same result.

    `result` is what is judged where it differs from what is timed (bringing ids home, say);
    `choices` are the ways to run it with so many threads at most, of which the fastest is measured;
    `per` counts the steps in one call where they are not the case's; `capturable` says whether its
    call may be tried as a CUDA graph.
    """

    call: Call
    result: Call | None = None
    choices: Callable[[int], list[Choice]] = lambda threads: []
    per: int | None = None
    capturable: bool = True


class UnknownNameError(ValueError):
    """A name that was asked for is none of ours or of the peers'."""


def no_peers(names: Sequence[str] | None) -> Iterator[tuple[str, Rival | str]]:
    yield from ()


@dataclass
class Case:
    """What is measured.

    Args:
        label: what tells it from the other cases of its op and shape.
        dtype: of the op's main input.
        ours: calls by backend; the first is the one that is compared with the peers.
        judge: compares a result with the reference and returns `error` or `exact` and what else
            there is to say; `ok` says whether it is the reference's, as ours has to be.
        peers: given their names (None: all) yields (name, Rival), or (name, why there is none).
        bytes, flops: what any implementation has to move and to compute in one call.
        per: steps in one call; all times are given for one step.
        graphs: on CUDA, ours is a graph, and peers are timed as graphs where they can be.
        facts: figures that are counted, not timed, taken after the timing.
    """

    op: str
    shape: str
    label: str
    dtype: str
    ours: dict[str, Call]
    judge: Callable[[Any], dict[str, Any]]
    peers: Callable[[Sequence[str] | None], Iterator[tuple[str, Rival | str]]] = no_peers
    bytes: float = 0.0
    flops: float = 0.0
    per: int = 1
    cuda: bool = False
    graphs: bool = False
    facts: Callable[[], dict[str, Any]] = field(default=dict)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled by torch for the shapes it is called with.

    torch remembers what it compiled before: at another shape it would make code for any.
    """
    import torch

    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def pick(
    rivals: dict[str, Callable[[], Rival]], names: Sequence[str] | None
) -> Iterator[tuple[str, Rival | str]]:
    """The named ones (None: all) of peers that are made when it is their turn."""
    for name in rivals if names is None else names:
        if name not in rivals:
            raise UnknownNameError(f"--peers must be of {tuple(rivals)}, got {name!r}")
        try:
            rival: Rival | str = rivals[name]()
        except Exception as error:  # a library may raise anything; the others are measured
            rival = f"{type(error).__name__}: {error}"
        yield name, rival
        del rival  # before the next one is made
