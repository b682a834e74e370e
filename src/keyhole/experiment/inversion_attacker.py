"""Who inverts networks: given networks and public images without labels, nothing else, it writes images of classes.

Nothing that is private can be had from here: this module imports neither data sets, nor trainings, nor the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import keyhole.inversion  # noqa: F401  (the import fills the registry)
from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.registry import INVERSIONS
from keyhole.core.told import Told
from keyhole.core.trial import Spec
from keyhole.core.types import Key
from keyhole.errors import KeyholeError, ModelError
from keyhole.experiment.inversion_cells import UNTRAINED, Network, grouped, is_made, taken, write_cell, write_failed
from keyhole.solve.files import digest
from keyhole.solve.invert import Inverted, invert

INVERSION_VERSION = 1
"""Raise it when the same settings, network and public images would give other images."""


class _Cell(NamedTuple):
    """One network under one attack."""

    target: Target
    seed: int
    file: Path
    what: str
    """For the progress bar."""
    identity: str
    """Names what its images were made from, beyond the settings."""

    @property
    def is_made(self) -> bool:
        return is_made(self.file, self.identity)


class Attacker:
    """Makes the images of every cell that has none.

    Args:
        networks: what is attacked; rounds of one federation follow each other in order.
        public: images (n, c, h, w) in [0, 1], on the device to work on.
        attacks: of the plan.
        samples: images of each class from each network.
        seed: of all randomness.
        told: told what is how far.
    """

    def __init__(
        self, networks: Sequence[Network], public: Tensor, attacks: Sequence[Spec], samples: int, seed: int, told: Told
    ) -> None:
        self.networks, self.public, self.attacks = networks, public, attacks
        self.samples, self.seed, self.told = samples, seed, told

    def check(self) -> None:
        """Refuse public images that an attack could not use."""
        for spec in self.attacks:
            try:
                INVERSIONS.build(spec.name, **spec.asdict()).check(self.public)
            except KeyholeError as error:
                raise type(error)(f"[[invert.attacks]] '{spec.name}': {error}") from error

    def attack(self) -> None:
        """Invert whatever is missing; a cell that fails says so, and the others go on."""
        for place, spec in enumerate(self.attacks):
            method: Inversion = INVERSIONS.build(spec.name, **spec.asdict())
            key = fold_in(fold_in(new_key(self.seed), "inversion"), spec.name)
            if method.per_target:
                for networks in grouped(self.networks, "defense", "seed"):
                    self._chain(method, key, {one.round: self._cell(place, spec, one) for one in networks})
            else:
                for networks in grouped(self.networks, "defense", "round"):
                    self._side_by_side(method, key, [self._cell(place, spec, one) for one in networks])

    def _cell(self, place: int, spec: Spec, network: Network) -> _Cell:
        target = network.target(self.public.device)
        # Whatever could change the images and is not in the folder's config.toml.
        known = digest(target.weights.params, target.weights.buffers, {"public": self.public})
        identity = f"{INVERSION_VERSION}.{spec.version}.{known}"
        return _Cell(target, network.seed, network.cell(place, spec), f"{spec.name} on {network.name}", identity)

    def _side_by_side(self, method: Inversion, key: Key, cells: list[_Cell]) -> None:
        """Networks of all seeds, which one prior serves; several at once where that is no slower."""
        size = 1 if self.public.device.type == "cpu" else len(cells)
        missing = [cell for cell in cells if not cell.is_made]
        for begin in range(0, len(missing), size):
            part = missing[begin : begin + size]
            place = Place(told=self.told)
            prior = method.prepare(part[0].target, self.public, fold_in(key, "prior"), place, None)
            self._make(method, key, prior, part)

    def _chain(self, method: Inversion, key: Key, cells: dict[int | str, _Cell]) -> None:
        """The rounds of one federation, each with a prior of its own, which may go on from that of the round before."""
        missing = [number for number, cell in cells.items() if not cell.is_made]
        attacked = [number for number in missing if isinstance(number, int)]
        before = None
        for number, cell in cells.items():
            untrained = number == UNTRAINED
            # What goes on from a prior that is made again is made again.
            make = number in missing or (not untrained and bool(attacked) and int(number) > attacked[0])
            if not make and not (attacked and not untrained):
                continue

            def preparing(stage: str, fraction: float, what: str = cell.what) -> None:
                self.told(f"{stage} ({what})", fraction)

            own = fold_in(fold_in(fold_in(key, "prior"), cell.seed), number)
            try:
                # An untrained network has no round before it.
                prior = method.prepare(
                    cell.target, self.public, own, Place(told=preparing), None if untrained else before
                )
            except ModelError as error:
                write_failed(cell.file, cell.identity, error)
                continue
            before = before if untrained else prior
            if make:
                self._make(method, key, prior, [cell])

    def _make(self, method: Inversion, key: Key, prior: Any, cells: list[_Cell]) -> None:
        """Invert networks and write what came out."""
        what = cells[0].what if len(cells) == 1 else f"{cells[0].what} and {len(cells) - 1} more"
        searches = [fold_in(fold_in(key, "searches"), cell.seed) for cell in cells]
        try:
            found = invert(
                method, cells[0].target.task, [cell.target.weights for cell in cells], prior, self.public,
                self.samples, searches, told=lambda fraction: self.told(what, fraction), at_once=len(cells),
            )  # fmt: skip
        except KeyholeError as error:
            if len(cells) == 1:
                write_failed(cells[0].file, cells[0].identity, error)
                return
            for cell in cells:  # one of them does not fail the others
                self._make(method, key, prior, [cell])
            return
        for cell, one in zip(cells, found, strict=True):
            own = fold_in(key, cell.seed).to(self.public.device)
            by_itself = _prior_samples(prior, cell.target.classes, self.samples, own)
            write_cell(cell.file, {"images": one.images, "prior_samples": by_itself}, _account(one, cell, prior))


def _prior_samples(prior: Any, classes: int, count: int, key: Key) -> Tensor:
    """What the generator makes of noise, given to classes as they come: (k, n, c, h, w)."""
    generator = prior.generator
    with torch.no_grad():
        made: Tensor = generator(normal(fold_in(key, "prior samples"), (classes * count, generator.latent)))
    return made.reshape(classes, count, *made.shape[1:])


def _account(found: Inverted, cell: _Cell, prior: Any) -> dict[str, Any]:
    return {
        "identity": cell.identity,
        "target_accuracy": taken(cell.target, found.images),
        "seconds": found.seconds,
        "prior_seconds": float(prior.facts.seconds),
        "searches": found.searches,
        "losses": list(found.losses),
    }
