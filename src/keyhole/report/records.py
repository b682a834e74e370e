"""The plain records that a report is made of: what a setting says of itself, rows of attackers, stored pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.report.intervals import Estimate, Spread

LABELS_ONLY = "labels_only"
"""The attack that recovers labels and no image."""


@dataclass(frozen=True)
class Setting:
    """What the experiment says about itself; filled by the runner. An audit has one, or several with names."""

    title: str
    task: str
    state: str
    threat: str
    assumptions: tuple[str, ...]
    planned: tuple[str, ...]
    """Hashes of all planned trials, in plan order. A trial may be planned in several settings: it counts in each."""
    budget: tuple[str, ...]
    versions: dict[str, str]
    classes: int
    name: str = ""
    against: str = ""
    """Name of the setting to compare this one with; empty for none."""


def is_attack(attacker: str) -> bool:
    """Whether an attacker is one, rather than a control or a self-test."""
    return not attacker.startswith(("control:", "check:"))


@dataclass(frozen=True)
class Row:
    """One attacker against one defense. The order of the fields is the order in ``report.json``."""

    task: str
    state: str
    threat: str
    defense: str
    attack: str
    attacker: str
    n: int
    """Images scored, counted once on each network."""
    networks: int
    leak_rate: Estimate
    leak_rate_90: Estimate
    leak_rate_mse: Estimate
    psnr: Spread
    ssim: Spread
    mse: Spread
    label_accuracy: Spread
    lift: Estimate
    evaluations: int
    seconds: float
    statuses: dict[str, int]
    images: int = 0
    """Distinct images scored."""
    uncontrolled: int = 0
    """Of ``n``, how many had no control to compare with: there the threshold alone decided."""
    nan: int = 0
    """Of ``n``, how many had an SSIM or MSE that is not a number."""
    identified: Estimate | None = None
    """Share of images nearer to their guess than every candidate is, in pixels; `None` where candidates are few."""
    identified_by_features: Estimate | None = None
    """The same by the input of the network's head."""
    update_norm: float = math.nan
    """Median Euclidean norm of the updates as they left the clients."""
    zeros: float = math.nan
    """Median share of entries of the update that are zero: what pruning or masking really reached."""
    setting: str = ""
    """Name of the setting; empty for a lone one."""
    success: Estimate | None = None
    """Share of updates that the attack itself, by its own score, counts as solved; `None` where nothing recorded it."""
    evaluations_per_image: float = math.nan
    """Mean number of gradient evaluations spent on the update behind an image."""
    labels: Estimate = Estimate()
    """Mean overlap of recovered and true labels, in [0, 1]; the interval is over batches and networks."""
    label_chance: float = math.nan
    """The overlap to expect of labels drawn evenly at random, were the true ones drawn so as well."""
    series: int = 1
    """Most updates of different images that one trial saw."""
    notes: dict[str, Spread] = field(default_factory=dict)
    """What the defense put on record about itself, over images or updates."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Sentences about trials that ended regularly, with how many trials each is about."""
    client_seconds: float = math.nan
    """Median time of a client's own work for one update, its defense included."""
    certified: Spread = Spread()
    """What a defense certifies, under its assumption, as the least mean squared error of each image."""
    below_certificate: Estimate = Estimate()
    """Share of images whose mean squared error is below what the defense certifies."""
    prior: float = math.nan
    """Success of the best guess without an update, from which the bound follows."""
    bound: float = math.nan
    """The largest share of images that any attack could recover, where the defense's noise sets a bound."""

    @property
    def leaks(self) -> int:
        """Number of leaked images, out of ``n``."""
        return round(self.leak_rate.value * self.n) if self.n else 0

    @property
    def labels_right(self) -> int:
        """Number of labels recovered, out of ``n``."""
        return round(self.labels.value * self.n) if math.isfinite(self.labels.value) else 0

    @property
    def is_attack(self) -> bool:
        """Whether this is an attacker, rather than a control or a self-test."""
        return is_attack(self.attacker)

    @property
    def labels_only(self) -> bool:
        """Whether the attack recovers labels and no image, so that its images say nothing."""
        return self.attack.partition("(")[0] == LABELS_ONLY

    @property
    def is_scored(self) -> bool:
        """Whether this is an attacker on images with at least one score."""
        return self.is_attack and self.n > 0 and not self.labels_only


class Images(NamedTuple):
    """Pictures that the run stored, if it stored any."""

    secrets: dict[str, NDArray[np.floating]] | None
    """By ``source/row``, the data and the row of its target pool: (c, h, w) in [0, 1]; `None` where secrets were not
    stored."""
    reconstructions: dict[str, NDArray[np.floating]]
    """By trial hash: (b, c, h, w) in [0, 1], in the order of the episode."""
