"""Model inversion through the rounds of a federation: train, attack the global networks, judge what came out.

``inversion_attacker`` gets networks and public images; ``inversion_judge`` alone reads private ones, after all images
are on disk. What stands between them are the files of ``inversion_cells``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from keyhole.core.told import Told, silent
from keyhole.core.types import Weights
from keyhole.errors import ConfigError, DataError
from keyhole.experiment.inversion_attacker import Attacker
from keyhole.experiment.inversion_cells import UNTRAINED, Network
from keyhole.experiment.inversion_judge import Inversions, Judge, fresh_evaluator
from keyhole.experiment.setup import find_device
from keyhole.experiment.store import Store
from keyhole.experiment.train import Problem, Trained, folder_of, train
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.federation.norms import evaluating
from keyhole.solve.threads import one_thread
from keyhole.zoo.datasets import Pool, load_pool

FOLDER = "inversions"


def invert_rounds(
    plan: TrainingPlan, folder: Path, *, jobs: int = 1, device: str = "cpu", told: Told = silent
) -> Inversions:
    """Train what is missing, invert what is missing, and score everything.

    Args:
        plan: with ``[invert]``.
        folder: the output folder; made if needed.
        jobs: trainings at a time on a CPU; 0 for one a core. The searches take one core.
        device: ``cpu`` or ``cuda``.
        told: told what is how far.

    Raises:
        ConfigError: the plan has no ``[invert]``, or something in it does not fit.
    """
    if plan.invert is None:
        raise ConfigError("this file has no [invert] section; add one with [[invert.public]] and [[invert.attacks]].")
    where, settings = find_device(device), plan.invert.settings
    # Before the folder is claimed: bad input must leave nothing behind, and cost no training.
    problem = Problem(plan, where)
    pools = public_images(plan, problem.data.image_shape)
    public = torch.cat([pool.images for pool in pools]).to(where)
    with one_thread(where):
        networks = global_networks(plan, problem, folder)
    attacker = Attacker(networks, public, plan.invert.attacks, settings.samples, settings.seed, told)
    attacker.check()
    fresh_evaluator(plan.invert, problem, pools)
    _check_private(problem, public)
    if settings.weights is not None:
        for network in networks:
            network.target(where)
    trained = train(plan, folder, jobs=jobs, device=device, told=told) if settings.weights is None else []
    with Store(folder) as store, one_thread(where):
        store.claim_config(plan.to_toml())
        attacker.attack()
        # Only now, with the last image on disk, is there anything that could tell a good one.
        return Judge(plan, problem, pools, networks, told).judged(trained)


def public_images(plan: TrainingPlan, shape: tuple[int, ...]) -> list[Pool]:
    """The attacker's images, a pool for each section, in the private images' shape."""
    assert plan.invert is not None
    pools = []
    for section in plan.invert.public:
        name = section.name or plan.data.name
        pool = load_pool(
            name, classes=section.classes, split=section.split, size=shape[1], limit=section.limit, seed=section.seed
        )
        if pool.images.shape[1] != shape[0]:
            raise DataError(
                f"public images of '{name}' have {pool.images.shape[1]} channels and the private ones {shape[0]}; "
                "choose public images of the same kind."
            )
        if tuple(pool.images.shape[1:]) != tuple(shape):
            raise DataError(
                f"public images of '{name}' are {tuple(pool.images.shape[1:])} and the private ones {tuple(shape)}; "
                "set data.size."
            )
        pools.append(pool)
    return pools


def global_networks(plan: TrainingPlan, problem: Problem, folder: Path) -> list[Network]:
    """What is attacked: for each defense and seed the rounds asked for, then, as a control, the untrained network.

    The files need not be there yet. Nothing of the problem but architectures and initial weights goes along.
    """
    assert plan.invert is not None
    settings = plan.invert.settings
    rounds: list[int | str] = [*plan.invert.rounds, *([UNTRAINED] if settings.controls else [])]
    networks = []
    for index, specs in enumerate(plan.defenses):
        task = evaluating(problem.task(specs))
        defense = " -> ".join(spec.name for spec in specs) or "no defense"
        for seed in plan.run.seeds:
            run = Trained(specs, seed, folder_of(plan, folder, index, seed))
            own = folder_of(plan, folder / FOLDER, index, seed)
            for number in rounds:
                after = number if isinstance(number, int) else 0
                weights: Weights | Path
                if settings.weights is None:
                    weights = run.checkpoint(after)
                elif number == UNTRAINED:
                    weights = problem.fresh(specs, seed)
                else:
                    weights = settings.file(seed, after)
                at = f"round {number}" if isinstance(number, int) else number
                networks.append(Network(index, seed, number, f"{defense}, seed {seed}, {at}", task, weights, own))
    return networks


def _check_private(problem: Problem, public: Tensor) -> None:
    """Private images must not be public too, and there must be some of each class to compare with."""
    data = problem.data
    private = {own for pool in (data.target, data.tune, data.public, data.candidates, data.train)
               for own in map(_pixels, pool.images)}  # fmt: skip
    both = sum(_pixels(image) in private for image in public)
    if both:
        raise DataError(f"{both} of the {len(public)} public images are private ones too; choose other public images.")
    missing = set(range(data.num_classes)) - set(problem.labels.tolist())
    if missing:
        raise DataError(
            f"the clients' {len(problem.labels)} images show none of class {min(missing)}, counted from 0, to "
            "compare with; raise data.train or data.target."
        )


def _pixels(image: Tensor) -> bytes:
    return hashlib.sha256(image.cpu().numpy().tobytes()).digest()
