"""What every registered defense and every counter promises, and the laws that the shipped ones follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from defense_cases import CASES, DRAWS, LAST, NEUTRAL, PAIRS, draws, label, remembers
from scipy import stats
from torch import Tensor
from torch.func import vmap

import keyhole.defenses  # noqa: F401  (fills the registry)
from keyhole.core.defense import Context, Counter, CounterChain, Defense, chain
from keyhole.core.keys import fold_in, new_key, normal, split
from keyhole.core.registry import DEFENSES
from keyhole.core.rule import ClientRule, LocalSGD, SingleGradient
from keyhole.core.task import plain_gradient
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Tensors
from keyhole.errors import ConfigError
from keyhole.parts.distances import relative_l2

KEY = new_key(41)
Case = tuple[str, dict[str, Any]]
each_case = pytest.mark.parametrize("case", PAIRS, ids=label)


def build(case: Case) -> Defense:
    return DEFENSES.build(case[0], **case[1])


ON_UPDATE = [case for case in PAIRS if type(build(case)).on_update is not Defense.on_update]
each_on_update = pytest.mark.parametrize("case", ON_UPDATE, ids=label)


def context(bench: Any, key: Tensor = KEY, state: dict[str, Tensors] | None = None) -> Context:
    return Context(bench.task, bench.weights, key, state={} if state is None else state)


def gradient_of(bench: Any, size: int = 2, seed: int = 0) -> Tensors:
    return plain_gradient(bench.task)(bench.weights, bench.batch(size, seed), KEY)


def large(seed: int = 0) -> Tensors:
    """An update of 60,000 entries in tensors of unlike scale."""
    key = fold_in(new_key(seed), "large")
    return {
        "a.weight": normal(fold_in(key, "a"), (100, 20, 5, 5), torch.float64),
        "b.weight": 0.01 * normal(fold_in(key, "b"), (10, 990), torch.float64),
        "b.bias": 5 * normal(fold_in(key, "c"), (100,), torch.float64),
    }


def sent(bench: Any, defense: Defense, batch: Batch, key: Tensor = KEY, rule: ClientRule | None = None) -> Tensors:
    """What leaves a client after one round."""
    bench = bench.under(defense)
    threat = ThreatModel(rule or SingleGradient(), batch_size=len(batch.inputs))
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), key, bench.public)
    update: Tensors = seen.update
    return update


def flat(update: Tensors) -> Tensor:
    return torch.cat([v.flatten() for v in update.values()])


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_every_defense_has_its_cases() -> None:
    names = {card.name for card in DEFENSES}
    assert set(CASES) == names, "add the defense to tests/contract/defense_cases.py"
    assert set(NEUTRAL) <= names
    assert names >= DRAWS
    assert all(CASES.values())


# What holds for all that act on the update.


@each_on_update
@pytest.mark.parametrize("which", ["bench", "norm_bench"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_and_names_shapes_and_types_are_kept(
    case: Case, which: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    own = request.getfixturevalue(which)
    update = {n: v.to(dtype) for n, v in gradient_of(own).items()}
    before, weights = {n: v.clone() for n, v in update.items()}, {n: v.clone() for n, v in own.weights.params.items()}
    out = build(case).on_update(update, context(own))
    assert same(update, before)
    assert same(own.weights.params, weights)
    assert list(out) == list(update)
    assert all((out[n].shape, out[n].dtype) == (update[n].shape, update[n].dtype) for n in update)
    assert not same(out, update), "these options must do something"


@each_on_update
def test_scalars_and_empty_tensors_are_accepted(case: Case, bench: Any) -> None:
    update = {"w": normal(KEY, (3, 4), torch.float64), "scale": torch.tensor(0.7).double()}
    out = build(case).on_update(update, context(bench))
    assert out["scale"].shape == ()
    zero = {n: torch.zeros_like(v) for n, v in update.items()}
    assert bool(flat(build(case).on_update(zero, context(bench))).isfinite().all())


@each_on_update
def test_a_chain_of_one_gives_the_same_bits(case: Case, bench: Any) -> None:
    update, defense = gradient_of(bench), build(case)
    assert same(chain(defense).on_update(update, context(bench)), defense.on_update(update, context(bench)))
    assert [c.name for c in chain(defense).counters()] == [c.name for c in defense.counters()]


@pytest.mark.parametrize("case", [(n, o) for n, several in NEUTRAL.items() for o in several], ids=label)
def test_a_neutral_setting_is_the_identity(case: Case, norm_bench: Any) -> None:
    batch = norm_bench.batch(2)
    assert same(sent(norm_bench, build(case), batch), sent(norm_bench, chain(), batch))


@each_on_update
def test_lifted_equals_looped(case: Case, norm_bench: Any) -> None:
    defense, keys = build(case), split(KEY, 3)
    updates = [gradient_of(norm_bench, 2, i) for i in range(3)]
    joined = {n: torch.stack([u[n] for u in updates]) for n in updates[0]}
    lifted = vmap(lambda u, k: defense.on_update(u, context(norm_bench, k)))(joined, keys)
    for i in range(3):
        one = defense.on_update(updates[i], context(norm_bench, keys[i]))
        assert all(torch.allclose(lifted[n][i], one[n], rtol=1e-10, atol=1e-12) for n in one)


@each_on_update
def test_randomness_is_fresh_for_each_key_and_the_same_for_the_same(case: Case, bench: Any) -> None:
    update, defense = gradient_of(bench), build(case)
    first = defense.on_update(update, context(bench))
    assert same(first, defense.on_update(update, context(bench)))
    assert same(first, defense.on_update(update, context(bench, fold_in(KEY, 1)))) == (not draws(case))


@each_case
def test_two_rounds_of_one_batch_differ_where_there_is_randomness_or_memory(case: Case, bench: Any) -> None:
    batch, bench = bench.batch(2), bench.under(build(case))
    first, second = observe(
        bench.task, ThreatModel(batch_size=2), build(case), bench.weights, (batch, batch), KEY, bench.public
    )
    assert same(first.update, second.update) == (not draws(case) and not remembers(case))


@each_on_update
def test_the_tensors_of_an_update_are_treated_independently(case: Case, bench: Any) -> None:
    if not draws(case):
        return
    # Of one size nearly, so that rounding has something to round, and no two alike.
    value = normal(KEY, (4000,), torch.float64).sign() * torch.linspace(0.9, 1.0, 4000).double()
    out = build(case).on_update({"a": value, "b": value}, context(bench))
    left, right = out["a"] / value - 1, out["b"] / value - 1
    assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 4.5 / math.sqrt(4000)


# What holds for all, over a client's whole round.

RULES = [SingleGradient(), LocalSGD(2, 0.3, 2)]


@each_case
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_round_changes_what_is_sent_and_nothing_else(case: Case, rule: ClientRule, bench: Any) -> None:
    bench = bench.under(build(case))  # so that the plain client has this model, too
    batch = bench.batch(3)
    given = [t.clone() for t in (*batch, *bench.weights.params.values())]
    out, plain = sent(bench, build(case), batch, rule=rule), sent(bench, chain(), batch, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(given, (*batch, *bench.weights.params.values()), strict=True))
    assert list(out) == list(plain)
    assert all((out[n].shape, out[n].dtype) == (plain[n].shape, plain[n].dtype) for n in plain)
    assert bool(flat(out).isfinite().all())
    assert not same(out, plain), "these options must do something"
    assert any(out[name].any() for name in out), "a client that sends nothing has not taken part"


@each_case
def test_a_chain_of_one_sends_the_same_bits(case: Case, bench: Any) -> None:
    batch, defense = bench.batch(2), build(case)
    assert same(sent(bench, chain(defense), batch), sent(bench, defense, batch))


@each_case
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rounds_lifted_equal_rounds_looped(case: Case, rule: ClientRule, bench: Any) -> None:
    defense, secrets = build(case), bench.secrets(3, 2)
    bench = bench.under(defense)
    (lifted,) = bench.see(secrets, ThreatModel(rule, batch_size=2), defense, seed=5)
    keys = split(fold_in(new_key(5), "test client"), 3)
    for i in range(3):
        one = sent(bench, defense, Batch(*(part[i] for part in secrets[0])), keys[i], rule)
        assert all(torch.allclose(lifted.update[n][i], one[n], rtol=1e-8, atol=1e-11) for n in one)


@each_case
def test_a_round_is_random_where_the_defense_draws(case: Case, bench: Any) -> None:
    batch, defense = bench.batch(2), build(case)
    first = sent(bench, defense, batch)
    assert same(first, sent(bench, defense, batch))
    assert same(first, sent(bench, defense, batch, fold_in(KEY, 1))) == (not draws(case))


# Counters.


@each_case
def test_every_defense_comes_with_a_counter(case: Case) -> None:
    counters = build(case).counters()
    assert counters
    assert len({c.name for c in counters}) == len(counters)
    for counter in counters:
        assert counter.name not in ("", "naive")
        assert counter.truth_loss in ("zero", "law", "none")


def truth_loss(bench: Any, defense: Defense, counter: Counter, size: int, key: Tensor) -> tuple[Tensor, Tensors]:
    """The matching loss at the true batch, by the attacker's own simulation and comparison."""
    # What layers draw is told, as it is wherever something is promised of the truth.
    threat = ThreatModel(batch_size=size, counter=counter, sees=frozenset({"weights", "update", "hints", "masks"}))
    bench, batch = bench.under(defense), bench.batch(size)
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), key, bench.public)
    facts = counter.facts(bench.task, (seen,))
    unknowns = counter.unknowns(bench.task, (seen,), KEY)
    candidate = {f"counter.{name}": value for name, value in unknowns.items()}
    simulated = threat.simulate(bench.task, seen, batch, facts, candidate, fold_in(KEY, "attacker"))
    mine, theirs = counter.compare(simulated, seen.update, facts)
    energy = torch.cat([tensor.ravel() for tensor in theirs.values()]).pow(2).sum()
    return (counter.distance or relative_l2)(mine, theirs, energy), seen.update


@each_case
@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_a_counter_that_says_zero_has_no_loss_at_the_truth(
    case: Case, which: str, request: pytest.FixtureRequest
) -> None:
    own, defense = request.getfixturevalue(which), build(case)
    for counter in defense.counters():
        if counter.truth_loss == "zero":
            loss, _ = truth_loss(own, defense, counter, 2, KEY)
            assert float(loss) < 1e-20
            naive, _ = truth_loss(own, defense, Counter(), 2, KEY)
            assert float(naive) > 1e-4, "the defense must be visible to who does not know it"


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PAIRS, 2)), ids=label)
def test_a_combination_that_says_zero_has_no_loss_at_the_truth(first: Case, second: Case, bench: Any) -> None:
    defense = chain(build(first), build(second))
    for counter in defense.counters():
        inner = counter.parts[:-1] if isinstance(counter, CounterChain) else ()
        if counter.truth_loss == "zero" and not any(part.name in LAST for part in inner):
            loss, _ = truth_loss(bench, defense, counter, 2, KEY)
            assert float(loss) < 1e-20, counter.name


@pytest.mark.parametrize(
    "case", [c for c in PAIRS if any(k.truth_loss == "law" for k in build(c).counters())]
    + [("gaussian_noise", {"std": 0.005}), ("gaussian_noise", {"std": 0.01, "scale": "rms"}),
       ("gaussian_noise", {"std": 2.0, "scale": "rms"}), ("gaussian_noise", {"std": 0.3}),
       ("laplace_noise", {"b": 0.005}), ("laplace_noise", {"b": 0.01, "scale": "rms"}),
       ("laplace_noise", {"b": 2.0, "scale": "rms"}), ("laplace_noise", {"b": 0.3})],
    ids=label,
)  # fmt: skip
def test_a_counter_that_says_law_predicts_its_loss_at_the_truth(case: Case, bench: Any) -> None:
    defense, draws = build(case), 200
    for counter in (c for c in defense.counters() if c.truth_loss == "law"):
        keys = split(fold_in(KEY, "draws"), draws)
        lifted, observed = vmap(lambda key, c=counter: truth_loss(bench, defense, c, 2, key))(keys)
        expected = [counter.expected_truth_loss({n: v[i] for n, v in observed.items()}) for i in range(draws)]
        losses, (means, spreads) = lifted.numpy(), np.array(expected).T
        off = (losses - means) / spreads
        standard_error = np.std(losses, ddof=1) / math.sqrt(draws)
        if np.std(means) < 1e-12:
            assert abs(np.mean(losses) - np.mean(means)) < 4 * standard_error
        assert abs(off.mean()) < 4 * off.std(ddof=1) / math.sqrt(draws)
        assert 0.75 < off.std(ddof=1) < 1.3, "the predicted spread"


def test_a_counter_without_a_law_says_so() -> None:
    with pytest.raises(NotImplementedError, match="naive"):
        Counter().expected_truth_loss({})


# The laws of the shipped defenses.


def test_noise_is_gaussian_with_the_stated_deviation(bench: Any) -> None:
    clean = large()
    out = DEFENSES.build("gaussian_noise", std=0.05).on_update(clean, context(bench))
    for name, noise in ((n, out[n] - clean[n]) for n in ("a.weight", "b.weight")):
        assert float(noise.std()) == pytest.approx(0.05, rel=0.02), name
        assert stats.kstest(noise.flatten().numpy() / 0.05, "norm").pvalue > 1e-3
    assert stats.kstest((flat(out) - flat(clean)).numpy() / 0.05, "norm").pvalue > 1e-3


@pytest.mark.parametrize("by", [1e-3, 1.0, 1e3])
def test_noise_in_units_of_the_rms_of_the_whole_update(by: float, bench: Any) -> None:
    clean = {n: by * v for n, v in large().items()}
    out = DEFENSES.build("gaussian_noise", std=0.1, scale="rms").on_update(clean, context(bench))
    unit = float(flat(clean).square().mean().sqrt())
    for name in ("a.weight", "b.weight"):
        assert float((out[name] - clean[name]).std()) == pytest.approx(0.1 * unit, rel=0.02)


@pytest.mark.parametrize("norm", [1e-3, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_keeps_the_direction_and_meets_the_norm(norm: float, dtype: torch.dtype, bench: Any) -> None:
    update = {n: v.to(dtype) for n, v in large().items()}
    before = float(flat(update).double().norm())
    assert before > norm
    out = DEFENSES.build("clip", norm=norm).on_update(update, context(bench))
    assert float(flat(out).double().norm()) == pytest.approx(norm, rel=1e-5)
    angle = torch.nn.functional.cosine_similarity(flat(out).double(), flat(update).double(), dim=0)
    assert float(angle) == pytest.approx(1, abs=1e-12 if dtype is torch.float64 else 1e-6)


def test_a_norm_below_the_threshold_is_left_alone(bench: Any) -> None:
    update = large()
    assert same(
        DEFENSES.build("clip", norm=float(flat(update).norm()) * 1.01).on_update(update, context(bench)), update
    )


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0, 3.0])
def test_clipping_in_units_of_the_update(share: float, bench: Any) -> None:
    update = large()
    out = DEFENSES.build("clip", norm=share, scale="update").on_update(update, context(bench))
    assert float(flat(out).norm() / flat(update).norm()) == pytest.approx(min(share, 1.0), rel=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_pruning_by_tensor_keeps_the_largest_of_each(rate: float, bench: Any) -> None:
    update = large()
    out = DEFENSES.build("prune", rate=rate).on_update(update, context(bench))
    for name, value in update.items():
        kept = out[name] != 0
        assert torch.equal(out[name][kept], value[kept])
        assert abs(float((~kept).double().mean()) - rate) <= 1.01 / value.numel()
        assert float(value[kept].abs().min()) >= float(value[~kept].abs().max())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_pruning_globally_has_one_threshold(rate: float, bench: Any) -> None:
    update = large()
    out = DEFENSES.build("prune", rate=rate, per="global").on_update(update, context(bench))
    before, after = flat(update), flat(out)
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert abs(float((~kept).double().mean()) - rate) <= 1.01 / before.numel()
    assert float(before[kept].abs().min()) >= float(before[~kept].abs().max())
    if rate == 0.9:
        assert not out["b.weight"].any(), "a tensor of small entries is emptied"


def test_ties_survive_pruning(bench: Any) -> None:
    update = {"w": torch.tensor([0.0, 0.0, 0.0, 1.0, -2.0]), "v": torch.tensor([1.0, -1.0, 1.0, 1.0])}
    out = DEFENSES.build("prune", rate=0.5).on_update(update, context(bench))
    assert out["w"].tolist() == [0, 0, 0, 1, -2]  # the threshold is 0: nothing lies below it
    assert out["v"].tolist() == [1, -1, 1, 1]
    out = DEFENSES.build("prune", rate=0.7).on_update(update, context(bench))
    assert out["w"].tolist() == [0, 0, 0, 1, -2]
    out = DEFENSES.build("prune", rate=0.9).on_update(update, context(bench))
    assert out["w"].tolist() == [0, 0, 0, 0, -2]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masking_removes_its_rate_and_keeps_the_rest(rate: float, bench: Any) -> None:
    update = large()
    out = DEFENSES.build("random_masking", rate=rate).on_update(update, context(bench))
    for name, value in update.items():
        kept = out[name] != 0
        assert torch.equal(out[name][kept], value[kept])
        low, high = stats.binom.interval(0.9999, value.numel(), rate)
        assert low <= int((~kept).sum()) <= high
    rows = (out["a.weight"] != 0).double().flatten(1)
    assert stats.binomtest(int(rows[:50].sum()), rows[:50].numel(), 1 - rate).pvalue > 1e-4


def test_masks_do_not_depend_on_the_values(bench: Any) -> None:
    defense = DEFENSES.build("random_masking", rate=0.5)
    masks = [{n: v != 0 for n, v in defense.on_update(large(seed), context(bench)).items()} for seed in (0, 1)]
    assert same(*masks)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_masking_by_channel_removes_whole_slices(rate: float, bench: Any) -> None:
    update = {"w": torch.ones(3000, 2, 3, 3).double(), "b": torch.ones(3000).double()}
    out = DEFENSES.build("random_masking", rate=rate, granularity="channel").on_update(update, context(bench))
    slices = out["w"].flatten(1)
    assert bool(((slices == 0).all(1) | (slices == 1).all(1)).all())
    for removed in ((slices == 0).all(1), out["b"] == 0):
        low, high = stats.binom.interval(0.9999, 3000, rate)
        assert low <= int(removed.sum()) <= high


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_rescaled_masking_is_right_on_average(granularity: str, bench: Any) -> None:
    update = {"w": torch.tensor([[1.0, -2.0], [3.0, 0.5]]).double()}
    defense = DEFENSES.build("random_masking", rate=0.4, rescale=True, granularity=granularity)
    drawn = vmap(lambda k: defense.on_update(update, context(bench, k))["w"])(split(KEY, 4000))
    error = (drawn.mean(0) - update["w"]) / update["w"].abs()
    assert float(error.abs().max()) < 4.5 * math.sqrt(0.4 / 0.6 / 4000)
    assert set((drawn / update["w"]).unique().round(decimals=9).tolist()) == {0.0, round(1 / 0.6, 9)}


def test_masking_spares_batchnorm_unless_told_otherwise(norm_bench: Any) -> None:
    update = gradient_of(norm_bench)
    spared = DEFENSES.build("random_masking", rate=0.9).on_update(update, context(norm_bench))
    masked = DEFENSES.build("random_masking", rate=0.9, batchnorm=True).on_update(update, context(norm_bench))
    norms = norm_bench.task.norm_params
    assert norms == {"1.weight", "1.bias"}
    for name in update:
        share = 0.0 if name in norms else 0.5
        assert float((spared[name] == 0).double().mean()) >= share
        if name in norms:
            assert torch.equal(spared[name], update[name])
    assert any((masked[name] == 0).any() for name in norms)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gaussian_noise", {"std": -0.1}),
        ("gaussian_noise", {"std": float("nan")}),
        ("clip", {"norm": 0.0}),
        ("clip", {"norm": -1.0}),
        ("prune", {"rate": 1.0}),
        ("prune", {"rate": -0.1}),
        ("random_masking", {"rate": 1.0}),
        ("random_masking", {"rate": 1.5}),
        ("laplace_noise", {"b": -0.1}),
        ("laplace_noise", {"b": math.inf}),
        ("top_k", {"rate": 1.0}),
        ("top_k", {"momentum": 1.0}),
        ("top_k", {"momentum": 0.5, "feedback": False}),
        ("quantize", {"levels": 1}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DEFENSES.build(name, **options)


@each_case
def test_a_defense_survives_toml(case: Case) -> None:
    import tomllib

    from keyhole.experiment.spec import parse_experiment

    raw = {
        "data": {"name": "digits"},
        "model": {"name": "lenet_zhu"},
        "attacks": [{"name": "idlg"}],
        "defenses": [{"chain": [{"name": case[0], **case[1]}]}],
    }
    experiment = parse_experiment(raw)
    again = parse_experiment(tomllib.loads(experiment.to_toml()))
    assert again == experiment
    (undefended, (spec,)) = again.defenses
    assert undefended == ()
    assert DEFENSES.build(spec.name, **spec.asdict()) == build(case)


def test_the_helpers_of_this_file_can_fail(bench: Any) -> None:
    class Liar(Counter):
        name, truth_loss = "liar", "zero"

    loss, _ = truth_loss(bench, DEFENSES.build("prune", rate=0.5), Liar(), 2, KEY)
    assert float(loss) > 1e-4
    update: Callable[..., Tensors] = DEFENSES.build("gaussian_noise", std=0.1).on_update
    assert not same(update(large(), context(bench)), large())
