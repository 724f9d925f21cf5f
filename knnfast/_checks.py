"""Checks of arguments that the package's calls share."""

from __future__ import annotations

from numbers import Real

import numpy as np


def check_range(
    name: str, value: int, low: int, high: int | None = None, why_high: str = ""
) -> None:
    """Refuse what is no whole number, or one out of its range."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} ... {high}"
        allowed += f" ({why_high})" if why_high else ""
        raise ValueError(f"{name}: must be {allowed}, got {value}")


def check_number(name: str, value: float) -> None:
    """Refuse what is no real number; its range is the caller's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name}: must be within the range of a float") from None


def check_flag(name: str, value: bool) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def hint(extra: str) -> str:
    """How to install what only a part of the package needs."""
    return f"install the extra `{extra}` (in the checkout: pip install '.[{extra}]')"
