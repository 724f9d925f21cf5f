"""Settings that JSON can hold: what the dataclasses of sizes and of training share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from typing_extensions import Self

TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "int | None": int | None, "float": int | float,
    "float | None": int | float | None, "str": str,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass of numbers, names and lists of them, each with a default.

    Raises:
        ValueError: a value of another type than its field's.
    """

    def __post_init__(self) -> None:
        for name, kind in self._types().items():
            value = getattr(self, name)
            wanted = TYPES.get(kind, tuple)
            number = isinstance(value, bool) and wanted is not bool  # to Python True is 1
            if number or not isinstance(value, wanted):
                raise ValueError(f"{name} must be {kind}, got {value!r}")

    @classmethod
    def _types(cls) -> dict[str, str]:
        types = {f.name: str(f.type) for f in fields(cls)}
        return {k: v for k, v in types.items() if v in TYPES or v.startswith("tuple")}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, or a part of it; settings within settings are not read."""
        return cls().updated(raw)

    def updated(self, raw: Mapping[str, Any]) -> Self:
        """These settings with some others, as JSON gives them.

        Raises:
            ValueError: an unknown name, or a value of another type.
        """
        types = self._types()
        if unknown := sorted(set(raw) - set(types)):
            raise ValueError(
                f"unknown settings {unknown}; {type(self).__name__} has {', '.join(types)}"
            )
        return replace(self, **{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
