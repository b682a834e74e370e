"""Concealed samples: the projection against a solver, the mixed gradient by hand, and what the inner loop promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import functional_call, vmap

import keyhole.attacks  # noqa: F401  (fills the registry)
from keyhole.core.defense import Context
from keyhole.core.keys import fold_in, new_key, split, threefry2x32
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.task import plain_gradient
from keyhole.core.tensors import dot, squared_norm
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Tensors
from keyhole.defenses.concealing import DAMPING, LEAST, Concealing, Decay, Mixing, apart, project
from keyhole.errors import ConfigError, Refused
from keyhole.solve.drive import solve
from keyhole.solve.lift import Shared, lift

KEY = new_key(3)
SHORT: dict[str, Any] = {"steps": 12}


def defense(**options: Any) -> Concealing:
    return DEFENSES.build("concealing", **{**SHORT, **options})  # type: ignore[return-value]


def context(bench: Any, key: Tensor = KEY) -> Context:
    return Context(bench.task, bench.weights, key, public=bench.batch(12, 50))


def sent(bench: Any, own: Concealing, size: int = 2, ctx: Context | None = None) -> Tensors:
    ctx = ctx or context(bench)
    return own.on_gradient(plain_gradient(bench.task), ctx)(bench.weights, bench.batch(size), fold_in(KEY, "step"))


def by_autograd(bench: Any, terms: list[tuple[float, Tensor, Tensor]]) -> Tensors:
    """The gradient of a weighted sum of torch's own mean cross-entropies, class indices as labels."""
    params = {name: p.clone().requires_grad_() for name, p in bench.weights.params.items()}
    total = sum(
        w * torch.nn.functional.cross_entropy(functional_call(bench.task.model, params, (x,)), y) for w, x, y in terms
    )
    return dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))  # type: ignore[arg-type]


def close(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-9, atol=1e-12) for n in a)


# The projection.


@pytest.mark.parametrize("slope", [-0.01, -0.4, -3.0])
def test_the_projection_solves_its_program(slope: float) -> None:
    honest = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor([-1.0]).double()}
    mixed = {"a": slope * honest["a"] + torch.tensor([2.0, -1.0]).double(), "b": slope * honest["b"]}
    product, square = float(dot(mixed, honest)), float(squared_norm(honest))
    assert product < 0
    found = minimize(
        lambda v: 0.5 * v[0] ** 2 * (square + DAMPING) + v[0] * product, [1.0], bounds=[(LEAST, None)], tol=1e-14
    ).x[0]
    out, fired = project(mixed, honest)
    assert bool(fired)
    assert all(torch.allclose(out[n], mixed[n] + found * honest[n], rtol=0, atol=1e-6) for n in mixed)
    after = float(dot(out, honest))
    if -product / (square + DAMPING) > LEAST:
        assert after == pytest.approx(product * DAMPING / (square + DAMPING), rel=1e-6)
    else:
        assert after >= -LEAST * DAMPING


def test_what_does_not_oppose_is_left_alone() -> None:
    honest, mixed = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([0.0, 3.0])}
    out, fired = project(mixed, honest)
    assert torch.equal(out["a"], mixed["a"])
    assert not bool(fired)


# The mixed gradient.


@pytest.mark.parametrize(
    ("options", "own", "parts"),
    [
        ({}, 0.7, 3),
        ({"variant": "strict"}, 0.7, 2),
        ({"own_label": 1.0}, 1.0, 2),
        ({"own_label": 0.0}, 0.0, 2),
        ({"variant": "inserted"}, 1.0, 2),
    ],
)
def test_the_enlarged_batch_has_the_gradient_of_the_mixed_loss(
    options: dict[str, Any], own: float, parts: int, bench: Any
) -> None:
    batch, concealed, y_c = bench.batch(3), bench.batch(4, 9).inputs, torch.tensor([3, 0, 2, 2])
    mixing = defense(sensitive=2, proxies=2, **options).mixing
    enlarged = mixing.enlarge(batch, concealed, torch.eye(4).double()[y_c])
    found = plain_gradient(bench.task)(bench.weights, enlarged, KEY)
    y = batch.targets.argmax(1)
    partners = y[[1, 1, 2, 2]]  # the last two images, each twice in a row
    terms = [(own / parts, concealed, y_c), ((1 - own) / parts, concealed, partners), (1 / parts, batch.inputs, y)]
    assert close(found, by_autograd(bench, terms))


def test_at_weight_one_the_private_labels_of_proxies_play_no_part(bench: Any) -> None:
    batch, concealed = bench.batch(2), bench.batch(2, 9).inputs
    labels = torch.eye(4).double()[[3, 3]]
    other = batch._replace(targets=batch.targets.roll(1, 0))
    for own, same in ((1.0, True), (0.7, False)):
        mixing = Mixing(0, 1, own, 2, projected=True)
        rows = [mixing.enlarge(b, concealed, labels).targets[:2] for b in (batch, other)]
        assert torch.equal(*rows) == same


# The inner loop.


def test_the_rate_falls_where_the_released_code_lets_it_fall() -> None:
    rates = [float(Decay(1000)(torch.tensor(step))) for step in range(1000)]
    falls = [step for step in range(1, 1000) if rates[step] < rates[step - 1]]
    assert falls == [374, 624, 875]
    assert rates[-1] == pytest.approx(1e-3)


def pairs(bench: Any, own: Concealing) -> tuple[Tensor, Tensor, Batch]:
    private = bench.batch(2)
    start, labels = own.begin(context(bench), private, KEY)
    return start, labels, private


def test_the_objective_is_its_formula(bench: Any) -> None:
    own = defense()
    start, labels, private = pairs(bench, own)
    found = own.objective(bench.task, bench.weights, labels, private)(start)
    g_s = by_autograd(bench, [(1.0, private.inputs, private.targets.argmax(1))])
    g_c = by_autograd(bench, [(1.0, start, labels.argmax(1))])
    cosine = sum(float((g_s[n] * g_c[n]).sum()) for n in g_s) / float((squared_norm(g_s) * squared_norm(g_c)).sqrt())
    logits = [functional_call(bench.task.model, bench.weights.params, (x,)) for x in (start, private.inputs)]
    d_x = np.mean([float((a - b).norm()) for a, b in zip(start, private.inputs, strict=True)])
    d_z = np.mean([float((a - b).norm() / b.norm()) for a, b in zip(*logits, strict=True)])
    assert float(found) == pytest.approx(1 - cosine + np.exp(-0.01 * d_x) + 0.01 * (d_z - 0.01), rel=1e-9)


@pytest.mark.parametrize("variant", ["released", "strict"])
def test_the_objective_falls(variant: str, bench: Any) -> None:
    own = defense(variant=variant, steps=40)
    start, labels, private = pairs(bench, own)
    objective = own.objective(bench.task, bench.weights, labels, private)
    found, taken = own.conceal(bench.task, bench.weights, start, labels, private)
    assert int(taken) == 40
    assert float(objective(found)) < float(objective(start))
    inside = torch.equal(found, bench.task.bounds.clamp(found))
    assert inside == (variant == "strict")


def test_who_is_far_enough_stops_beyond_the_mark(bench: Any) -> None:
    own = defense(steps=200, far=14.0)
    start, labels, private = pairs(bench, own)
    assert float(apart(start, private.inputs)) < 14.0
    found, taken = own.conceal(bench.task, bench.weights, start, labels, private)
    assert 0 < int(taken) < 200
    assert float(apart(found, private.inputs)) > 14.0


def test_slack_moves_nothing_as_released_and_something_in_the_strict_variant(bench: Any) -> None:
    for variant, same in (("released", True), ("strict", False)):
        found = []
        for slack in (0.0, 5.0):
            own = defense(variant=variant, slack=slack, features=1.0)
            start, labels, private = pairs(bench, own)
            found.append(own.conceal(bench.task, bench.weights, start, labels, private)[0])
        assert torch.allclose(*found, rtol=1e-9) == same


def test_starts(bench: Any) -> None:
    private, public = bench.batch(2), context(bench).public
    assert public is not None
    natural, labels = defense().begin(context(bench), private, KEY)
    for image, label in zip(natural, labels, strict=True):
        row = [torch.equal(image, other) for other in public.inputs].index(True)
        assert torch.equal(label, public.targets[row])
    assert not torch.equal(natural[0], natural[1]), "drawn without replacement"
    mixed, _ = defense(start="mixup").begin(context(bench), private, KEY)
    assert torch.allclose(mixed, 0.7 * natural + 0.3 * private.inputs)
    noise, drawn = defense(start="noise").begin(context(bench), private, KEY)
    assert noise.shape == private.inputs.shape
    assert torch.equal(drawn.sum(1), torch.ones(2).double())


# As a whole.


def test_names_shapes_and_weights_stay_and_randomness_is_the_keys(norm_bench: Any) -> None:
    before = {n: v.clone() for part in norm_bench.weights for n, v in part.items()}
    first = sent(norm_bench, defense())
    assert {n: v.shape for n, v in first.items()} == {n: v.shape for n, v in norm_bench.weights.params.items()}
    assert all(torch.equal(v, before[n]) for part in norm_bench.weights for n, v in part.items())
    assert close(first, sent(norm_bench, defense()))
    assert not close(first, sent(norm_bench, defense(), ctx=context(norm_bench, fold_in(KEY, 1))))


def test_lifted_equals_looped(bench: Any) -> None:
    own, keys = defense(proxies=2, sensitive=1), split(KEY, 3)
    lifted = vmap(lambda key: sent(bench, own, ctx=context(bench, key)))(keys)
    for i in range(3):
        one = sent(bench, own, ctx=context(bench, keys[i]))
        assert all(torch.allclose(lifted[n][i], one[n], rtol=1e-8, atol=1e-11) for n in one)


def test_what_is_noted_and_hinted(bench: Any) -> None:
    ctx = context(bench)
    sent(bench, defense(proxies=2), ctx=ctx)
    assert {"stop_step", "distance", "gradient_cosine", "projection_fired"} == ctx.notes.keys()
    assert float(ctx.notes["stop_step"][0]) == 12
    assert -1 <= float(ctx.notes["gradient_cosine"][0]) <= 1
    assert ctx.hints["labels"].shape == (4, 4)
    assert ctx.hints.keys() == {"labels"}, "the proxies themselves stay secret"
    plain = context(bench)
    sent(bench, defense(variant="inserted"), ctx=plain)
    assert "stop_step" not in plain.notes


@pytest.mark.parametrize("options", [{}, {"variant": "strict"}, {"variant": "inserted"}, {"proxies": 2}])
def test_the_counter_told_the_proxies_has_no_loss_at_the_truth(options: dict[str, Any], bench: Any) -> None:
    own, ctx = defense(**options), context(bench)
    update = sent(bench, own, ctx=ctx)
    private = Batch(*(part.repeat_interleave(own.proxies, 0) for part in bench.batch(2)))
    proxies, labels = own.begin(ctx, private, threefry2x32(KEY, fold_in(KEY, "step")))
    if own.variant != "inserted":
        proxies, _ = own.conceal(bench.task, bench.weights, proxies, labels, private)
    given, found = own.counters()
    plain = plain_gradient(bench.task)
    for counter, facts, unknowns in (
        (given, {"labels": labels}, {"proxies": proxies}),
        (found, {}, {"proxies": proxies, "labels": (labels + 1e-30).log()}),
    ):
        simulated = counter.believe(plain, facts, unknowns)(bench.weights, bench.batch(2), KEY)
        assert all(torch.allclose(simulated[n], update[n], rtol=1e-7, atol=1e-9) for n in update)


def test_the_matched_attacker_gets_closer_to_an_image_beside_an_inserted_one(bench: Any) -> None:
    own, secrets, keys = defense(variant="inserted"), bench.secrets(3), split(new_key(8), 3)
    shared, public = Shared(bench.weights), bench.batch(12, 50)
    attack = ATTACKS.build("idlg", labels="given", start="random", steps=150)
    sees = frozenset({"weights", "update", "targets", "hints"})
    errors = []
    for threat in (ThreatModel(sees=sees), ThreatModel(sees=sees, counter=own.counters()[0])):  # type: ignore[arg-type]

        def see(batches: tuple[Batch, ...], key: Tensor, threat: ThreatModel = threat) -> Any:
            return observe(bench.task, threat, own, bench.weights, batches, key, public)

        seen = lift(see, shared)(secrets, keys)
        solved = solve(attack, bench.task, threat, seen, None, keys, shared)
        found = torch.stack([one.reconstruction.inputs for one in solved])
        assert found.shape == secrets[0].inputs.shape, "the private images and nothing else"
        errors.append(float((found - secrets[0].inputs).square().mean(dim=(1, 2, 3, 4)).median()))
    assert errors[1] < 0.5 * errors[0]


# Refusals.


def test_options_and_circumstances_that_do_not_fit_are_refused(bench: Any, make_bench: Any) -> None:
    wrong: list[dict[str, Any]] = [{"steps": 0}, {"lr": 0.0}, {"own_label": 1.1}, {"far": 0.0}, {"proxies": 0}]
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            DEFENSES.build("concealing", **options)
    with pytest.raises(Refused, match="sensitive"):
        sent(bench, defense(sensitive=3))
    with pytest.raises(Refused, match="public"):
        sent(bench, defense(), ctx=replace(context(bench), public=None))
    dropping = make_bench("conv_drop", dropout="active")
    with pytest.raises(Refused, match="dropout"):
        sent(dropping, defense())
