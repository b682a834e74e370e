"""Options under which every registered defense is tested; a defense that is missing here fails its contract."""

from __future__ import annotations

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "gaussian_noise": [{"std": 0.02}, {"std": 0.3, "scale": "rms"}],
    "laplace_noise": [{"b": 0.02}, {"b": 0.3, "scale": "rms"}],
    "dp_sgd": [
        {"clip": 0.1, "noise_multiplier": 0.5},
        {"clip": 0.1, "noise_multiplier": 0.5, "batch": 2.0},
        {"clip": 0.5, "noise_multiplier": 0.1, "sample_rate": 0.5},
    ],
    "user_dp": [{"clip": 0.05}],
    "clip": [{"norm": 0.05}, {"norm": 0.1, "scale": "update"}],
    "bido": [{"smallest": 2}, {"measure": "coco", "inputs": 1.0, "labels": 50.0, "smallest": 2, "layers": "0"}],
    "mid": [{}, {"beta": 0.01, "width": 5, "eval_mean": False}],
    # Two images' normalised HSIC is nearly 1 whatever they are, and so only large weights and widths are seen.
    "mid_unilateral": [
        {"weight": 50.0, "smallest": 2},
        {"weight": 500.0, "measure": "hsic", "sigma": 50.0, "smallest": 2},
    ],
    "neg_label_smoothing": [{}, {"smoothing": -0.5, "start": 3, "full": 9}],
    "concealing": [{"start": "noise", "steps": 4}, {"start": "noise", "steps": 4, "variant": "strict"}],
    "prune": [{"rate": 0.5}, {"rate": 0.3, "per": "global"}],
    "withhold": [{"layers": "0"}, {"layers": "0.bias"}],
    "top_k": [{"rate": 0.5}, {"rate": 0.5, "feedback": False}, {"rate": 0.3, "granularity": "global", "momentum": 0.5}],
    "quantize": [{"levels": 4}, {"levels": 4, "mode": "qsgd"}, {"mode": "sign"}],
    "obscuring": [{"steps": 20}, {"steps": 20, "start": "noise", "labels": 1.0}],
    "soteria": [{"rate": 0.4}, {"rate": 0.6, "score": "exact"}, {"rate": 0.5, "live_only": True, "constant": 0.1}],
    "random_masking": [
        {"rate": 0.5},
        {"rate": 0.3, "granularity": "channel"},
        {"rate": 0.4, "rescale": True},
        {"rate": 0.4, "batchnorm": True},
    ],
}
"""Options, defaults and others."""

NEUTRAL: dict[str, list[dict[str, Any]]] = {
    "user_dp": [{"clip": 1e9}],
    "withhold": [{"layers": ""}],
    "bido": [{"inputs": 0.0, "labels": 0.0}, {}],
    "mid_unilateral": [{"weight": 0.0}, {}],
    "neg_label_smoothing": [{"smoothing": 0.0}],
    "laplace_noise": [{"b": 0.0}, {"b": 0.0, "scale": "rms"}],
    "top_k": [{"rate": 0.0}, {"rate": 0.0, "momentum": 0.9}, {"rate": 0.0, "feedback": False}],
    "gaussian_noise": [{"std": 0.0}, {"std": 0.0, "scale": "rms"}],
    "clip": [{"norm": 1e9}, {"norm": 1.0, "scale": "update"}],
    "prune": [{"rate": 0.0}, {"rate": 0.0, "per": "global"}],
    "soteria": [{"rate": 0.0}, {"rate": 0.0, "live_only": True}],
    "random_masking": [{"rate": 0.0}, {"rate": 0.0, "granularity": "channel"}, {"rate": 0.0, "rescale": True}],
}
"""Options under which a defense leaves every update of two images exactly as it is."""

DRAWS = {"concealing", "dp_sgd", "gaussian_noise", "laplace_noise", "mid", "obscuring", "quantize", "random_masking"}
"""Defenses that use randomness under some of their options."""

LAST = {"interval", "signs"}
"""Counters whose promise holds only where nothing follows their defense in a chain: they need its output as it was."""


def draws(case: tuple[str, dict[str, Any]]) -> bool:
    """Whether the defense uses randomness under these options."""
    name, options = case
    return options.get("mode") == "qsgd" if name == "quantize" else name in DRAWS


def remembers(case: tuple[str, dict[str, Any]]) -> bool:
    """Whether what is sent depends on earlier rounds."""
    name, options = case
    return name == "top_k" and bool(options.get("feedback", True))


PAIRS = [(name, options) for name, several in CASES.items() for options in several]


def label(case: Any) -> str:
    """A test's name: the defense and what is unusual about its options."""
    if isinstance(case, tuple) and len(case) == 2 and isinstance(case[1], dict):
        return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])
    return str(case)
