"""Beliefs: no loss at the truth where they are right, some where they are wrong, and how they merge and approximate."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import grad, vmap

from keyhole.attacks.idlg import idlg
from keyhole.core.belief import Belief
from keyhole.core.defense import chain
from keyhole.core.keys import fold_in, integers, new_key, normal, permutation, split
from keyhole.core.registry import BELIEFS
from keyhole.core.rule import ClientRule, LocalSGD, SingleGradient
from keyhole.core.tensors import squared_norm
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Observation, Seen, Tensors
from keyhole.errors import ConfigError, Refused
from keyhole.parts.distances import relative_l2

KEY, OWN = new_key(29), new_key(31)


def belief_of(name: str, rule: ClientRule, **options: Any) -> Belief:
    return BELIEFS.build(name, rule=rule, **options)


def sent(bench: Any, rule: ClientRule, batch: Batch, key: Tensor = KEY) -> Observation:
    (seen,) = observe(
        bench.task, ThreatModel(rule, batch_size=len(batch.inputs)), chain(), bench.weights, (batch,), key
    )
    return seen


def loss(
    bench: Any, rule: ClientRule, belief: Belief, seen: Observation, guess: Batch, unknowns: Tensors | None = None
) -> Tensor:
    threat = ThreatModel(rule, belief, len(guess.inputs) // belief.copies)
    simulated = threat.simulate(bench.task, seen, guess, {}, unknowns or {}, OWN)
    return relative_l2(simulated, seen.update, squared_norm(seen.update))


RULES = [SingleGradient(), LocalSGD(3, 0.3, 2), LocalSGD(1, 0.5, 1), LocalSGD(2, 0.1, 4, "shuffled")]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_who_knows_the_rule_has_no_loss_at_the_truth(
    rule: ClientRule, which: str, request: pytest.FixtureRequest
) -> None:
    own = request.getfixturevalue(which)
    batch = own.batch(4)
    seen, belief = sent(own, rule, batch), belief_of("exact", rule)
    assert float(loss(own, rule, belief, seen, batch)) < 1e-24
    elsewhere = batch._replace(inputs=batch.inputs + 0.1)
    assert float(loss(own, rule, belief, seen, elsewhere)) > 1e-6
    assert (belief.copies, belief.unknowns(batch.inputs, OWN), belief.describe()) == (1, {}, rule.describe())


WRONG = [
    ("sgd", {"lr": 0.15}),
    ("sgd", {"epochs": 2}),
    ("sgd", {"batch_size": 4}),
    ("sgd", {"batch_size": 1, "lr": 0.31}),
    ("gradient", {}),
]


@pytest.mark.parametrize(("name", "options"), WRONG)
def test_who_is_wrong_about_it_has_some(name: str, options: dict[str, Any], bench: Any) -> None:
    rule, batch = LocalSGD(3, 0.3, 2), bench.batch(4)
    seen, belief = sent(bench, rule, batch), belief_of(name, rule, **options)
    assert float(loss(bench, rule, belief, seen, batch)) > 1e-5
    right = belief_of("sgd", rule)
    assert float(loss(bench, rule, right, seen, batch)) < 1e-24


def test_a_guess_is_known_by_its_own_settings() -> None:
    rule = LocalSGD(3, 0.3, 2)
    guess = belief_of("sgd", rule, epochs=1, lr=0.5)
    assert guess.scale(4) == 0.5 * 2
    assert guess.describe() == "1 local epoch of SGD with batches of 2, learning rate 0.5, order fixed (a guess)"
    assert belief_of("gradient", rule).scale(4) == 1
    assert belief_of("exact", rule).scale(4) == pytest.approx(0.3 * 6)
    assert belief_of("straight_line", rule).scale(4) == pytest.approx(0.3 * 6)
    # Of a client that sends gradients, one step of learning rate 1 is the same.
    assert belief_of("sgd", SingleGradient()).scale(4) == 1


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("straight_line", {}, SingleGradient()),
        ("sgd", {"lr": -1.0}, LocalSGD()),
        ("sgd", {"epochs": 0}, SingleGradient()),
        ("order_unknown", {"agreement": -0.1}, LocalSGD()),
        ("order_unknown", {}, SingleGradient()),
    ],
)
def test_what_cannot_be_believed_is_refused(name: str, options: dict[str, Any], rule: ClientRule) -> None:
    with pytest.raises(ConfigError):
        belief_of(name, rule, **options)


def test_a_simulation_needs_what_it_reads(bench: Any) -> None:
    batch, rule = bench.batch(2), LocalSGD(1, 0.1, 1)
    seen = sent(bench, rule, batch)
    for name in ("exact", "straight_line"):
        with pytest.raises(Refused, match="needs its weights"):
            threat = ThreatModel(rule, belief_of(name, rule), 2)
            threat.simulate(bench.task, seen._replace(weights=None), batch, {}, {"belief.place": torch.zeros(1)}, OWN)
    with pytest.raises(Refused, match="needs the update"):
        threat = ThreatModel(rule, belief_of("straight_line", rule), 2)
        threat.simulate(bench.task, seen._replace(update=None), batch, {}, {"belief.place": torch.zeros(1)}, OWN)


@pytest.mark.parametrize("name", ["exact", "straight_line", "order_unknown"])
def test_the_loss_can_be_differentiated_through_all_steps(name: str, bench: Any) -> None:
    """Against central differences, along a random direction."""
    rule = LocalSGD(2, 0.3, 1)
    seen, belief = sent(bench, rule, bench.batch(2)), belief_of(name, rule)
    guess = bench.batch(2, seed=1)
    guess = Batch(*(torch.cat([part] * belief.copies) for part in guess))
    unknowns = {f"belief.{n}": v for n, v in belief.unknowns(guess.inputs, OWN).items()}

    def value(x: Tensor) -> Tensor:
        return loss(bench, rule, belief, seen, guess._replace(inputs=x), unknowns)

    along, step = normal(OWN, tuple(guess.inputs.shape), torch.float64), 1e-5
    slope = float((grad(value)(guess.inputs) * along).sum())
    numeric = float(value(guess.inputs + step * along) - value(guess.inputs - step * along)) / (2 * step)
    assert slope == pytest.approx(numeric, rel=1e-6)


# One guess for each image and epoch


def arranged(batch: Batch, orders: tuple[tuple[int, ...], ...]) -> Batch:
    """The batch once for each epoch, in that epoch's order, labels with their images."""
    rows = torch.tensor([row for order in orders for row in order])
    return Batch(*(part[rows] for part in batch))


def test_with_each_epochs_own_order_there_is_no_loss(bench: Any) -> None:
    rule, batch = LocalSGD(2, 0.3, 1, "shuffled"), bench.batch(3)
    belief = belief_of("order_unknown", rule)
    assert belief.copies == 2
    pairs = list(itertools.product(itertools.permutations(range(3)), repeat=2))
    for key in split(KEY, 3):
        seen = sent(bench, rule, batch, key)
        losses = {pair: float(loss(bench, rule, belief, seen, arranged(batch, pair))) for pair in pairs}
        right = [pair for pair, value in losses.items() if value < 1e-20]
        assert len(right) == 1, "one pair of orders explains the update, and no other"
        assert min(value for pair, value in losses.items() if pair != right[0]) > 1e-8


def test_epochs_agree_where_they_hold_the_same_images(bench: Any) -> None:
    belief = belief_of("order_unknown", LocalSGD(3, 0.1, 1, "shuffled"), agreement=0.5)
    images = bench.batch(4).inputs
    orders = [permutation(key, 4) for key in split(KEY, 3)]
    assert float(belief.penalty(torch.cat([images[order] for order in orders]))) < 1e-30
    shifted = torch.cat([images, images + 0.3, images])
    # Means of 0, 0.3 and 0 beside their mean of 0.1: squares of 0.01, 0.04 and 0.01, of which the mean is 0.02.
    assert float(belief.penalty(shifted)) == pytest.approx(0.5 * 0.02, rel=1e-12)
    assert float(belief_of("exact", LocalSGD()).penalty(images)) == 0


def test_epochs_are_paired_and_averaged(bench: Any) -> None:
    """Well separated images: the closest pair first is then the optimal assignment, here by scipy."""
    belief = belief_of("order_unknown", LocalSGD(3, 0.1, 1))
    for key in split(KEY, 5):
        images = normal(fold_in(key, "images"), (5, 1, 8, 8), torch.float64)
        epochs = [
            images[permutation(fold_in(key, e), 5)] + 0.1 * normal(fold_in(key, 10 + e), (5, 1, 8, 8), torch.float64)
            for e in range(3)
        ]
        expected = epochs[0].clone()
        for other in epochs[1:]:
            cost = torch.cdist(epochs[0].flatten(1), other.flatten(1)) ** 2
            expected = expected + other[linear_sum_assignment(cost.numpy())[1]]
        assert torch.allclose(belief.merge(torch.cat(epochs)), expected / 3, rtol=1e-12)


def test_each_guess_is_used_once_and_the_closest_pair_comes_first() -> None:
    belief = belief_of("order_unknown", LocalSGD(2, 0.1, 1))
    first, second = torch.tensor([0.0, 1.0, 5.0]).double(), torch.tensor([0.9, 6.0, 1.4]).double()
    # 1 takes 0.9 (0.01), 5 takes 6 (1), and 0 is left with 1.4, though 0.9 is nearer.
    merged = belief.merge(torch.cat([first, second]).reshape(6, 1, 1, 1)).flatten()
    assert torch.allclose(merged, torch.tensor([0.7, 0.95, 5.5]).double())


def test_merging_lifts(bench: Any) -> None:
    belief = belief_of("order_unknown", LocalSGD(2, 0.1, 1))
    guesses = normal(KEY, (4, 6, 1, 8, 8), torch.float64)
    lifted = vmap(belief.merge)(guesses)
    assert torch.allclose(lifted, torch.stack([belief.merge(g) for g in guesses]), rtol=1e-14)
    single = bench.batch(3).inputs
    assert belief_of("exact", LocalSGD()).merge(single) is single


# One gradient for all steps


def at(place: float) -> Tensors:
    """The unknown under which the point lies this share of the way."""
    return {"belief.place": torch.tensor([(place - 0.5) / 0.05]).double()}


def test_one_step_lies_at_the_beginning_of_the_line(bench: Any) -> None:
    rule, batch = LocalSGD(1, 0.5, 4), bench.batch(4)
    seen, belief = sent(bench, rule, batch), belief_of("straight_line", rule)
    assert float(loss(bench, rule, belief, seen, batch, at(0.0))) < 1e-24
    assert float(loss(bench, rule, belief, seen, batch, at(-3.0))) < 1e-24, "not before the beginning"
    assert float(loss(bench, rule, belief, seen, batch, at(0.5))) > 1e-6


def test_the_line_is_better_the_smaller_the_steps(bench: Any) -> None:
    """Against the true update of 8 steps: the distance falls with the square of the learning rate, or faster."""
    batch, errors = bench.batch(4), []
    for lr in (0.1, 0.01, 0.001):
        rule = LocalSGD(4, lr, 2)
        seen, belief = sent(bench, rule, batch), belief_of("straight_line", rule)
        values = [float(loss(bench, rule, belief, seen, batch, at(a / 20))) ** 0.5 for a in range(21)]
        errors.append(min(values))
        assert min(values[1:-1]) < values[0], "somewhere on the line is better than its beginning"
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.15 * errors[1]


def test_the_place_starts_in_the_middle_and_is_one_number_a_trial(bench: Any) -> None:
    belief = belief_of("straight_line", LocalSGD(4, 0.1, 2))
    threat = ThreatModel(LocalSGD(4, 0.1, 2), belief, 2)
    unknowns = threat.unknowns(bench.task, bench.batch(2).inputs, OWN)
    assert {n: v.tolist() for n, v in unknowns.items()} == {"belief.place": [0.0]}
    assert unknowns["belief.place"].dtype == torch.float64
    state = Seen((), {"square": torch.zeros(()).double(), "targets": torch.eye(4).double()[:2]})
    assert set(idlg().start(bench.task, threat, state, None, KEY)) == {"inputs", "belief.place"}


# Labels are read off the update at the scale of one gradient


def meek(bench: Any) -> Any:
    """The same network with a tenth of its weights: its predictions hardly differ, so that every rule counts right."""
    return replace(bench, weights=bench.weights._replace(params={n: 0.1 * w for n, w in bench.weights.params.items()}))


def drawn(bench: Any, seed: int) -> Batch:
    labels = integers(fold_in(KEY, seed), 4, (8,)).sort().values
    return bench.batch(8, seed)._replace(targets=torch.eye(4).double()[labels])


@pytest.mark.parametrize("labels", ["geng", "ilrg", "auto"])
def test_labels_are_read_off_many_small_steps(labels: str, bench: Any) -> None:
    own, rule, attack = meek(bench), LocalSGD(1, 1e-3, 2), idlg(labels=labels)
    hits = {"exact": 0, "straight_line": 0, "sgd": 0, "gradient": 0}
    for seed in range(10):
        batch = drawn(own, seed)
        seen = sent(own, rule, batch)
        for name in hits:
            threat = ThreatModel(rule, belief_of(name, rule, **({"lr": 1e-4} if name == "sgd" else {})), 8)
            found = attack.infer(own.task, threat, Seen((seen,), {}), KEY)["targets"]
            hits[name] += torch.equal(found, batch.targets)
    assert hits["exact"] == hits["straight_line"] == 10
    # Who takes the update for one gradient reads one that is 250 times too small, and with a tenth of the rate ten
    # times too large.
    assert hits["gradient"] <= 3
    assert hits["sgd"] <= 3


def test_an_epochs_labels_are_repeated_for_the_next(bench: Any) -> None:
    own, rule = meek(bench), LocalSGD(3, 1e-3, 2, "shuffled")
    batch, threat = drawn(own, 0), ThreatModel(rule, belief_of("order_unknown", rule), 8)
    found = idlg().infer(own.task, threat, Seen((sent(own, rule, batch),), {}), KEY)["targets"]
    assert torch.equal(found, batch.targets.repeat(3, 1))
    assert threat.guesses == 24


def test_beliefs_are_values(bench: Any) -> None:
    """Plain configuration: equal where their settings are, and never changed by use."""
    rule = LocalSGD(2, 0.1, 1)
    for card in BELIEFS:
        one = belief_of(card.name, rule)
        before = copy.deepcopy(one)
        assert one == belief_of(card.name, rule)
        one.merge(bench.batch(2).inputs)
        assert one == before
        assert one.describe()


def test_labels_of_an_unknown_order_are_mixed_by_doubly_stochastic_matrices() -> None:
    belief = belief_of("order_unknown", LocalSGD(3, 0.1, 1))
    unknowns = belief.unknowns(torch.zeros(12, 1, 8, 8).double(), KEY)
    assert unknowns["order"].shape == (3, 4, 4)
    assert not torch.equal(unknowns["order"][0], unknowns["order"][1])
    # Four different labels: what comes out are the matrices themselves.
    matrices = belief.relabel(torch.eye(4).double().repeat(3, 1), unknowns).reshape(3, 4, 4)
    assert torch.allclose(matrices.sum(1), torch.ones(3, 4).double(), atol=1e-6)
    assert torch.allclose(matrices.sum(2), torch.ones(3, 4).double(), atol=1e-6)
    assert matrices.min() > 0
    rows = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
    certain = {"order": 10 * torch.nn.functional.one_hot(rows, 4).double()}
    targets = torch.tensor([0, 1, 1, 3]).repeat(3)
    ordered = belief.relabel(torch.eye(4).double()[targets], certain).argmax(-1).reshape(3, 4)
    assert ordered.tolist() == [[1, 0, 3, 1], [0, 1, 1, 3], [3, 1, 1, 0]]
