"""What lifting buys: the lifted engine against the classic loop that attacks one image at a time.

Run ``python benchmarks/lifted.py``, or add ``--quick`` for a first look and ``--json FILE`` for the numbers.

All times are CPU seconds of this process, which runs one thread, so that other processes weigh less; on a busy machine
they still share caches, which is why classic and lifted rounds alternate and the ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any

import torch
from classic import classic_step
from torch import Tensor, nn
from torch.func import grad_and_value

from keyhole.attacks.idlg import idlg
from keyhole.attacks.matching import GradientMatching
from keyhole.core.defense import Defense
from keyhole.core.keys import fold_in, new_key, normal, uniform
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.tensors import flatten, unflatten
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Key, Observation, Seen
from keyhole.experiment.run import START_JITTER
from keyhole.metrics.image import structural_similarity
from keyhole.solve.drive import Watch, solve
from keyhole.solve.lift import Shared, lift
from keyhole.solve.memory import keep_freed_memory
from keyhole.zoo.datasets import load_data
from keyhole.zoo.models import build_model

ROUND_SECONDS = 0.4
"""Least CPU time of one timed round of steps."""
WINDOW = (20, 80)
"""Evaluations between which ticks of an optimizer are timed: its memory is part full in both engines."""
RECIPE_CAP = 1500
"""Evaluations after which the literature's recipe is ended; it has no such limit of its own."""
RECIPE_OUTER = 300
RECOVERED = 0.9
"""SSIM from which an image counts as reconstructed."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Some trials on one network: what both engines are given, and the secret images for scoring."""

    model: nn.Module
    task: Task
    threat: ThreatModel
    shared: Shared
    observations: tuple[Observation, ...]
    keys: Tensor
    starts: Tensor
    """(trials, 1, *shape)."""
    secrets: Tensor
    """(trials, *shape)."""
    labels: Tensor

    def __len__(self) -> int:
        return len(self.secrets)

    def target(self, trial: int) -> list[Tensor]:
        """The observed gradient of one trial, in the order of the model's parameters."""
        update = self.observations[0].update
        assert update is not None
        return [update[name][trial].clone() for name, _ in self.model.named_parameters()]

    def scale(self, trial: int) -> float:
        """One over the squared norm of the observed gradient."""
        return 1.0 / sum(float(t.square().sum()) for t in self.target(trial))


def make_problem(name: str, options: dict[str, Any], images: Tensor, labels: Tensor, classes: int) -> Problem:
    """Trials whose secrets are ``images`` (n, c, h, w), as the runner would set them up: one network, gray starts."""
    shape = tuple(images.shape[1:])
    model = build_model(name, input_shape=shape, num_classes=classes, options=options, seed=0).eval()
    bounds = Bounds.of((0.0,) * shape[0], (1.0,) * shape[0])
    task = Task.of(model, shape, classes, bounds, batchnorm="eval")
    threat = ThreatModel(sees=frozenset({"weights", "update", "targets"}))
    weights = weights_of(model)
    shared = Shared(weights)
    count = len(images)
    keys = torch.stack([fold_in(new_key(0), i) for i in range(count)])
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    secret = (Batch(images[:, None], one_hot[:, None], torch.ones(count, 1)),)
    see = lift(lambda batches, key: observe(task, threat, Defense(), weights, batches, key), shared)
    observations = see(secret, lift(lambda key: fold_in(key, "client"), shared)(keys))
    noise = lift(lambda key: normal(fold_in(key, "start images"), (1, *shape)), Shared())(keys)
    return Problem(model, task, threat, shared, observations, keys, 0.5 + START_JITTER * noise, images, labels)


def noise_images(count: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """Secrets for timing alone: the cost of a step does not depend on what the image shows."""
    return uniform(new_key(1), (count, *shape)), torch.arange(count) % classes


# One evaluation of the objective with its gradient.


def lifted_step(problem: Problem, attack: GradientMatching) -> Callable[[], tuple[Tensor, Tensor]]:
    """The evaluation that the engine makes in every tick, for all trials at once: gradients and objectives."""
    shapes = {"inputs": (1, *problem.task.input_shape)}

    def evaluate(x: Tensor, seen: Seen, key: Key) -> tuple[Tensor, Tensor]:
        def objective(x: Tensor) -> tuple[Tensor, Tensor]:
            return attack.loss(problem.task, problem.threat, seen, unflatten(x, shapes), key)

        gradient, (value, _) = grad_and_value(objective, has_aux=True)(x)
        return gradient, value

    def infer(observations: tuple[Observation, ...], key: Key) -> Seen:
        return Seen(observations, attack.infer(problem.task, problem.threat, Seen(observations, {}), key))

    seen = lift(infer, problem.shared)(problem.observations, problem.keys)
    x = lift(flatten, problem.shared)({"inputs": problem.starts})
    run = lift(evaluate, problem.shared)
    return lambda: run(x, seen, problem.keys)


def classic_steps(problem: Problem, lean: bool = True) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same evaluation by the classic loop, for the first trial alone."""
    image = problem.starts[0].clone().requires_grad_(True)
    label, target, scale = problem.labels[:1], problem.target(0), problem.scale(0)

    def step() -> tuple[Tensor, Tensor]:
        value = classic_step(problem.model, image, label, target, scale, lean)
        assert image.grad is not None
        return image.grad, value

    return step


def check_equal(problem: Problem, attack: GradientMatching) -> None:
    """Both engines must compute the same thing, or their times do not compare."""
    gradient, value = lifted_step(problem, attack)()
    own_gradient, own_value = classic_steps(problem)()
    torch.testing.assert_close(value[0], own_value, rtol=1e-3, atol=1e-6)
    error = float((gradient[0] - own_gradient.flatten()).norm() / own_gradient.norm())
    assert error < 1e-3, f"the gradients differ by {error:.1e}"


def repeats(run: Callable[[], Any]) -> int:
    """Calls that fill one round; warms up on the way."""
    run()
    began = process_time()
    run()
    return max(1, math.ceil(ROUND_SECONDS / max(process_time() - began, 1e-4)))


def milliseconds(run: Callable[[], Any], calls: int) -> float:
    """CPU time of one call."""
    began = process_time()
    for _ in range(calls):
        run()
    return 1e3 * (process_time() - began) / calls


@dataclass(frozen=True)
class Cost:
    """One line of the first table."""

    model: str
    trials: int
    lifted_ms: float
    """Of one trial-step."""
    classic_ms: float
    ratio: float
    """Median over rounds."""
    low: float
    """Least and greatest ratio of any round."""
    high: float

    @classmethod
    def of(cls, model: str, trials: int, rounds: Sequence[tuple[float, float]]) -> Cost:
        """From (classic, lifted) milliseconds, one pair a round."""
        ratios = [classic / lifted for classic, lifted in rounds]
        mids = [median(column) for column in zip(*rounds, strict=True)]
        return cls(model, trials, mids[1], mids[0], median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return (
            f"{self.model} {self.trials} {self.lifted_ms:.3f} {self.ratio:.2f}x"
            f"   (classic {self.classic_ms:.3f} ms, rounds {self.low:.2f}-{self.high:.2f}x)"
        )


def step_cost(
    name: str, options: dict[str, Any], shape: tuple[int, ...], classes: int, trials: int, rounds: int
) -> Cost:
    """Milliseconds of an evaluation, classic and lifted in turn."""
    problem = make_problem(name, options, *noise_images(trials, shape, classes), classes)
    attack = idlg(labels="given")
    check_equal(problem, attack)
    classic, lifted = classic_steps(problem, lean=False), lifted_step(problem, attack)
    many, few = repeats(classic), repeats(lifted)
    pairs = [(milliseconds(classic, many), milliseconds(lifted, few) / trials) for _ in range(rounds)]
    return Cost.of(name, trials, pairs)


def script_cost(rounds: int) -> float:
    """How many times a lean classic step a plain ``backward()`` costs, on LeNet."""
    problem = make_problem("lenet_zhu", {}, *noise_images(1, (1, 32, 32), 100), 100)
    lean, plain = classic_steps(problem), classic_steps(problem, lean=False)
    calls = repeats(lean)
    repeats(plain)
    return median(1.0 / (milliseconds(lean, calls) / milliseconds(plain, calls)) for _ in range(rounds))


# Whole ticks: an evaluation and the optimizer's share.


class Enough(Exception):  # noqa: N818  (not an error: ends an optimizer that has no such rule)
    """Raised in a closure."""


def lifted_ticks(problem: Problem) -> float:
    """Milliseconds of one trial in one tick of the engine, between the evaluations of `WINDOW`."""
    attack = replace(idlg(labels="given"), tolerance=0.0, patience=0)

    def seconds(limit: int) -> float:
        began = process_time()
        solve(
            attack, problem.task, problem.threat, problem.observations, problem.starts[:, None],
            problem.keys, problem.shared, Watch(limit=limit),
        )  # fmt: skip
        return process_time() - began

    early, late = WINDOW
    return 1e3 * (seconds(late) - seconds(early)) / (late - early) / len(problem)


def classic_ticks(problem: Problem, trial: int = 0) -> float:
    """Milliseconds of one evaluation inside `torch.optim.LBFGS`, all it does included, between those of `WINDOW`."""
    image = problem.starts[trial].clone().requires_grad_(True)
    label, target, scale = problem.labels[trial : trial + 1], problem.target(trial), problem.scale(trial)
    early, late = WINDOW
    optimizer = torch.optim.LBFGS(
        [image], lr=1, max_iter=2 * late, history_size=100, tolerance_grad=0, tolerance_change=0
    )
    stamps: list[float] = []

    def closure() -> Tensor:
        stamps.append(process_time())
        if len(stamps) > late:
            raise Enough
        return classic_step(problem.model, image, label, target, scale)

    try:
        optimizer.step(closure)
    except Enough:
        return 1e3 * (stamps[late] - stamps[early]) / (late - early)
    raise RuntimeError("torch.optim.LBFGS ended early")


def tick_cost(trials: int, rounds: int) -> Cost:
    """Milliseconds of a whole tick, classic and lifted in turn, on LeNet."""
    data = load_data("faces")
    index = torch.arange(trials) % len(data.target)
    problem = make_problem("lenet_zhu", {}, data.target.images[index], data.target.labels[index], data.num_classes)
    pairs = [(classic_ticks(problem, i % trials), lifted_ticks(problem)) for i in range(rounds)]
    return Cost.of("lenet_zhu+lbfgs", trials, pairs)


# Reconstructions.


@dataclass
class Tally:
    """What an attack made of some images, and what it cost."""

    name: str
    seconds: float = 0.0
    """CPU time, all images together."""
    ssim: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    capped: int = 0
    """Images on which the evaluations ran out."""

    @property
    def recovered(self) -> int:
        """Images reconstructed."""
        return sum(value >= RECOVERED for value in self.ssim)

    @property
    def price(self) -> float:
        """Core-seconds for one reconstruction."""
        return self.seconds / self.recovered if self.recovered else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.price:.3f} core-s a reconstruction, {1 / self.price:.2f} a core-s; "
            f"{self.recovered} of {len(self.ssim)} images at SSIM >= {RECOVERED}, "
            f"{fmean(self.evaluations):.0f} evaluations an image, "
            f"{1e3 * self.seconds / sum(self.evaluations):.2f} ms each, "
            f"{self.capped} out of evaluations"
        )


def run_lifted(problem: Problem, attack: GradientMatching) -> Tally:
    """Keyhole's engine on all images at once."""
    tally = Tally("lifted")
    began = process_time()
    solved = solve(
        attack, problem.task, problem.threat, problem.observations, problem.starts[:, None],
        problem.keys, problem.shared,
    )  # fmt: skip
    tally.seconds = process_time() - began
    guesses = torch.cat([one.reconstruction.inputs for one in solved])
    tally.ssim = _score(guesses, problem.secrets)
    tally.evaluations = [one.evaluations for one in solved]
    tally.capped = sum(one.status == "budget" for one in solved)
    return tally


Answer = tuple[Tensor, int, bool]
"""An image, the evaluations it took, and whether they ran out."""


def one_by_one(problem: Problem, attack: GradientMatching, trial: int) -> Answer:
    """`torch.optim.LBFGS` with what the lifted attack has too: start, objective, stop rules, best iterate.

    It judges every evaluation, where the engine looks at a group every ten. Its absolute tolerances are off, as they
    would freeze trials that the stop rules let go on.
    """
    image = problem.starts[trial].clone().requires_grad_(True)
    label, target, scale = problem.labels[trial : trial + 1], problem.target(trial), problem.scale(trial)
    best, kept, mark, count = math.inf, image.detach().clone(), math.inf, 0

    def closure() -> Tensor:
        nonlocal best, kept, mark, count
        objective = classic_step(problem.model, image, label, target, scale)
        value, count = float(objective), count + 1
        if value < best:
            best, kept = value, image.detach().clone()
        if best <= attack.tolerance or count >= attack.steps or not math.isfinite(value):
            raise Enough
        if count % attack.patience == 0:
            if not best < mark * (1 - attack.min_progress):
                raise Enough
            mark = best
        return objective

    optimizer = torch.optim.LBFGS([image], lr=1, max_iter=20, history_size=100, tolerance_grad=0, tolerance_change=0)
    try:
        while True:
            optimizer.step(closure)
    except Enough:
        return kept, count, count >= attack.steps


def recipe(problem: Problem, trial: int) -> Answer:
    """The published scripts: raw objective, noise, `torch.optim.LBFGS` as it comes, the last iterate."""
    image = normal(fold_in(problem.keys[trial], "recipe"), problem.starts[trial].shape).requires_grad_(True)
    label, target = problem.labels[trial : trial + 1], problem.target(trial)
    losses: list[float] = []

    def closure() -> Tensor:
        if len(losses) >= RECIPE_CAP:
            raise Enough
        objective = classic_step(problem.model, image, label, target, lean=False)
        losses.append(float(objective))
        return objective

    optimizer = torch.optim.LBFGS([image])
    outer: list[float] = []
    try:
        while len(outer) < RECIPE_OUTER:
            optimizer.step(closure)
            outer.append(losses[-1])
            same = len(outer) >= 5 and len(set(outer[-5:])) == 1
            if outer[-1] < 1e-6 or not math.isfinite(outer[-1]) or same:
                break
    except Enough:
        return image.detach(), len(losses), True
    return image.detach(), len(losses), False


def add(tally: Tally, run: Callable[[int], Answer], problem: Problem, trials: Sequence[int]) -> None:
    """Attack some images one by one, and score them off the clock."""
    for trial in trials:
        began = process_time()
        image, evaluations, capped = run(trial)
        tally.seconds += process_time() - began
        tally.ssim += _score(image, problem.secrets[trial : trial + 1])
        tally.evaluations.append(evaluations)
        tally.capped += capped


def _score(guesses: Tensor, secrets: Tensor) -> list[float]:
    guesses = torch.nan_to_num(guesses, nan=0.0).clamp(0.0, 1.0)
    return structural_similarity(guesses, secrets).tolist()


@dataclass(frozen=True)
class Throughput:
    """The three attacks on the same faces."""

    lifted: Tally
    equal: Tally
    recipe: Tally

    def ratios(self) -> dict[str, float]:
        """How many times cheaper a reconstruction is."""
        return {
            "lifted vs one-by-one (equal start, objective, stop)": self.equal.price / self.lifted.price,
            "lifted vs literature recipe (raw objective, random start)": self.recipe.price / self.lifted.price,
        }


def reconstruct(images: int, fewer: int, rounds: int) -> Throughput:
    """Run all three, a share of the one-by-one images after each lifted run."""
    data = load_data("faces", target=96, tune=0, public=4)
    pool = data.target
    problem = make_problem("lenet_zhu", {}, pool.images[:images], pool.labels[:images], data.num_classes)
    attack = idlg(labels="given")
    lifted_ticks(problem)  # warms up
    runs, equal, published = [], Tally("one-by-one"), Tally("literature recipe")
    for turn in range(rounds):
        runs.append(run_lifted(problem, attack))
        share = range(turn, fewer, rounds)
        add(equal, lambda trial: one_by_one(problem, attack, trial), problem, share)
        add(published, lambda trial: recipe(problem, trial), problem, share)
    lifted = replace(runs[0], seconds=median(run.seconds for run in runs))
    return Throughput(lifted, equal, published)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rounds and images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do; the classic engines run under it too
    rounds = 3 if options.quick else 7
    print(f"{torch.get_num_threads()} thread, torch {torch.__version__}, {platform.machine()}, float32; CPU time")

    print("\nStep cost: <model> <trials> <ms per trial-step> <ratio>x, medians of alternating rounds")
    sizes: list[tuple[str, dict[str, Any], tuple[int, ...], int, int]]
    sizes = [("lenet_zhu", {}, (1, 32, 32), 100, n) for n in ((1, 32) if options.quick else (1, 8, 32, 128))]
    sizes += [("convnet", {"width": 16}, (3, 32, 32), 10, n) for n in ((4,) if options.quick else (1, 4, 8))]
    steps: list[Cost] = []
    for size in sizes:
        steps.append(step_cost(*size, rounds))
        print(steps[-1], flush=True)
    for trials in (32,) if options.quick else (1, 8, 32, 128):
        steps.append(tick_cost(trials, 3 if options.quick else 5))
        print(steps[-1], flush=True)
    plain = script_cost(rounds)
    print(
        "classic steps and the recipe end in a plain backward(), as the scripts' do; the step that stops at the image, "
        f"which both torch optimizers at equal terms are given, costs {1 / plain:.2f} times as much"
    )

    images, fewer = (8, 4) if options.quick else (96, 24)
    print(f"\nReconstructions: faces, lenet_zhu, label known; lifted {images} images, the others the first {fewer}")
    print(f"the recipe is ended after {RECIPE_CAP} evaluations", flush=True)
    done = reconstruct(images, fewer, 2 if options.quick else 3)
    for tally in (done.lifted, done.equal, done.recipe):
        print(tally)
    for name, ratio in done.ratios().items():
        print(f"{name}: {ratio:.2f}x")

    if options.json:
        tallies = (done.lifted, done.equal, done.recipe)
        record = {
            "quick": options.quick,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "clock": "process CPU time",
            "steps": {f"{cost.model} {cost.trials}": asdict(cost) for cost in steps},
            "plain_backward": plain,
            "recipe_cap": RECIPE_CAP,
            "reconstructions": [
                {**asdict(t), "recovered": t.recovered, "core_seconds_each": t.price if t.recovered else None}
                for t in tallies
            ],
            "ratios": done.ratios(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
