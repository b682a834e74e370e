"""Options under which every registered defense is tested; a defense that is missing here fails its contract."""

from __future__ import annotations

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "gaussian_noise": [{"std": 0.02}, {"std": 0.3, "scale": "rms"}],
    "clip": [{"norm": 0.05}, {"norm": 0.1, "scale": "update"}],
    "prune": [{"rate": 0.5}, {"rate": 0.3, "per": "global"}],
    "random_masking": [
        {"rate": 0.5},
        {"rate": 0.3, "granularity": "channel"},
        {"rate": 0.4, "rescale": True},
        {"rate": 0.4, "batchnorm": True},
    ],
}
"""Options, defaults and others."""

NEUTRAL: dict[str, list[dict[str, Any]]] = {
    "gaussian_noise": [{"std": 0.0}, {"std": 0.0, "scale": "rms"}],
    "clip": [{"norm": 1e9}, {"norm": 1.0, "scale": "update"}],
    "prune": [{"rate": 0.0}, {"rate": 0.0, "per": "global"}],
    "random_masking": [{"rate": 0.0}, {"rate": 0.0, "granularity": "channel"}, {"rate": 0.0, "rescale": True}],
}
"""Options under which a defense leaves every update exactly as it is."""

DRAWS = {"gaussian_noise", "random_masking"}
"""Defenses that use randomness."""

PAIRS = [(name, options) for name, several in CASES.items() for options in several]


def label(case: Any) -> str:
    """A test's name: the defense and what is unusual about its options."""
    if isinstance(case, tuple) and len(case) == 2 and isinstance(case[1], dict):
        return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])
    return str(case)
