"""How long work tells of itself."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[str, float], None]
"""Told what is being done, and how far it is in [0, 1]."""


def silent(what: str, fraction: float) -> None:
    """Says nothing."""
