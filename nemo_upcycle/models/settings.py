"""The values of a Hugging Face `config.json`, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_upcycle.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """A configuration's values.

    Args:
        values: by Llama's names, without nulls.
        where: how messages call the file.
        spelling: the file's own name of a setting -> Llama's, where they differ.
    """

    values: dict[str, Any]
    where: str
    spelling: Mapping[str, str] = field(default_factory=dict)

    def wrong(self, key: str, expected: str, fix: str = "correct config.json") -> CheckpointError:
        """Return the error that says what a value should be."""
        value = self.values.get(key)
        spelled = next((own for own, llama in self.spelling.items() if llama == key), key)
        return CheckpointError(
            f"{self.where}: {spelled}", got="nothing" if value is None else repr(value), expected=expected, fix=fix
        )

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """Return a whole number; a size has no default."""
        value = self.values.get(key, default)
        if type(value) is int and value > most:
            raise self.wrong(key, f"at most {most:,}")
        if type(value) is not int or value < least:
            raise self.wrong(key, "a positive whole number" if least else "a whole number, 0 or more")
        return value

    def number(self, key: str) -> float:
        """Return a positive number."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a truth value; absent is false."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], fix: str) -> str:
        """Return what a name stands for."""
        name = self.values.get(key)
        if not isinstance(name, str) or name not in choices:
            raise self.wrong(key, " or ".join(choices), fix)
        return choices[name]
