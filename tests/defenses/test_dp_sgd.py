"""DP-SGD: the mechanism, its accounting, and the bound on every reconstruction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import stats
from scipy.integrate import quad
from torch import Tensor, nn
from torch.func import vmap

from keyhole.core.belief import Simulated
from keyhole.core.defense import Context, Defense, chain, defended_gradient
from keyhole.core.keys import fold_in, new_key, split
from keyhole.core.registry import DEFENSES
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task, cross_entropy, plain_gradient, weights_of
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Tensors, Weights
from keyhole.defenses.dp_sgd import DPSGD, couples
from keyhole.errors import ConfigError, Refused

KEY = new_key(17)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def private(bench: Any, defense: Defense, batch: Batch, key: Tensor = KEY) -> Tensors:
    """What a client under ``defense`` computes in one step."""
    gradient = defended_gradient(bench.task, defense, Context(bench.task, bench.weights, fold_in(key, "round")))
    return gradient(bench.weights, batch, fold_in(key, "step"))


def by_autograd(bench: Any, batch: Batch) -> list[Tensors]:
    """Each example's gradient by torch.autograd, one after another."""
    found = []
    for i in range(batch.inputs.shape[0]):
        params = {n: p.clone().requires_grad_(True) for n, p in bench.weights.params.items()}
        logits = bench.task.logits(Weights(params, bench.weights.buffers), batch.inputs[i : i + 1])
        loss = -(batch.targets[i] * torch.log_softmax(logits[0], 0)).sum()
        loss.backward()
        found.append({n: p.grad for n, p in params.items()})
    return found


def norm(update: Tensors) -> float:
    return math.sqrt(sum(float((v**2).sum()) for v in update.values()))


def flat(update: Tensors) -> Tensor:
    return torch.cat([v.flatten() for v in update.values()])


# The mechanism.


@pytest.mark.parametrize("divisor", [0.0, 7.0])
def test_clipping_by_example_is_that_of_a_loop(divisor: float, bench: Any) -> None:
    batch = bench.batch(5)
    each = by_autograd(bench, batch)
    norms = sorted(norm(g) for g in each)
    clip = (norms[2] + norms[3]) / 2  # some are clipped and some are not
    assert norms[0] < clip < norms[-1]
    got = private(bench, DPSGD(clip=clip, noise_multiplier=0.0, batch=divisor), batch)
    for name, value in got.items():
        wanted = sum(g[name] * min(1.0, clip / (norm(g) + 1e-6)) for g in each) / (divisor or 5)
        assert torch.allclose(value, wanted, **EXACT)


def test_without_clipping_noise_or_sampling_it_is_the_gradient(bench: Any) -> None:
    batch = bench.batch(3)
    got = private(bench, DPSGD(clip=1e9, noise_multiplier=0.0), batch)
    wanted = plain_gradient(bench.task)(bench.weights, batch, KEY)
    assert all(torch.allclose(got[n], wanted[n], **EXACT) for n in wanted)


def test_one_record_moves_the_sum_by_at_most_the_clip(bench: Any) -> None:
    batch, clip = bench.batch(4), 0.05
    defense = DPSGD(clip=clip, noise_multiplier=0.0, batch=1.0)
    whole = private(bench, defense, batch)
    padded = batch._replace(share=batch.share * torch.tensor([1.0, 1.0, 0.0, 1.0]))
    without = private(bench, defense, padded)
    moved = norm({n: whole[n] - without[n] for n in whole})
    assert moved <= clip
    assert moved == pytest.approx(clip, rel=1e-3)
    assert float(norm(by_autograd(bench, batch)[2])) > clip


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("divisor", [0.0, 8.0])
def test_the_noise_is_gaussian_of_z_times_c_on_the_sum_over_the_expected_size(
    size: int, divisor: float, bench: Any
) -> None:
    batch, z, clip = bench.batch(size), 0.7, 0.3
    keys = split(KEY, 200)
    noisy = vmap(lambda key: flat(private(bench, DPSGD(z, clip, batch=divisor), batch, key)))(keys)
    clean = flat(private(bench, DPSGD(0.0, clip, batch=divisor), batch))
    noise = (noisy - clean).flatten().numpy()
    assert noise.size > 1e5
    std = z * clip / (divisor or size)
    assert float(noise.std()) == pytest.approx(std, rel=0.02)
    assert stats.kstest(noise / std, "norm").pvalue > 1e-3
    assert abs(float(np.corrcoef((noisy - clean)[:, :2].numpy().T)[0, 1])) < 4.5 / math.sqrt(200)


def test_an_empty_draw_sends_noise_alone(bench: Any) -> None:
    batch = bench.batch(2)
    keys = split(KEY, 20)
    rare = {"sample_rate": 1e-9, "batch": 2.0}
    sent = vmap(lambda key: flat(private(bench, DPSGD(0.5, 0.3, **rare), batch, key)))(keys)
    assert stats.kstest(sent.flatten().numpy() * 2.0 / (0.5 * 0.3), "norm").pvalue > 1e-3
    silent = private(bench, DPSGD(0.0, 0.3, **rare), batch)
    assert norm(silent) == 0.0


def test_poisson_sampling_takes_each_example_by_itself_and_divides_by_the_expected_size(bench: Any) -> None:
    batch, rate, clip = bench.batch(3), 0.3, 0.2
    each = torch.stack([flat(g) * clip / (norm(g) + 1e-6) for g in by_autograd(bench, batch)])
    assert all(norm(g) > clip for g in by_autograd(bench, batch))
    keys = split(KEY, 1500)
    sums = 3 * rate * vmap(lambda key: flat(private(bench, DPSGD(0.0, clip, rate), batch, key)))(keys)
    taking = torch.linalg.lstsq(each.T, sums.T).solution.T
    drawn = taking.round()
    assert float((taking - drawn).abs().max()) < 1e-9
    counts = [int((drawn @ torch.tensor([4.0, 2.0, 1.0]).double() == code).sum()) for code in range(8)]
    wanted = [1500 * rate ** bin(c).count("1") * (1 - rate) ** (3 - bin(c).count("1")) for c in range(8)]
    assert stats.chisquare(counts, wanted).pvalue > 1e-3


def test_every_local_step_and_round_has_noise_of_its_own(bench: Any) -> None:
    batch = bench.batch(2)
    defense = DPSGD(clip=1e-9, noise_multiplier=1e6)  # noise of 1e-3 / 2 on every entry; the weights hardly move
    rule = LocalSGD(epochs=8, lr=0.1, batch_size=2)
    seen = observe(bench.task, ThreatModel(rule, batch_size=2), defense, bench.weights, (batch, batch), KEY)
    first, second = (flat(one.update) for one in seen)
    std = 0.1 * math.sqrt(8) * 5e-4  # eight independent draws add in squares
    assert float(first.std()) == pytest.approx(std, rel=0.15)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4.5 / math.sqrt(first.numel())


def test_lifted_over_clients_equals_one_by_one(bench: Any) -> None:
    defense, keys = DPSGD(0.5, 0.1, 0.6), split(KEY, 3)
    rule = LocalSGD(epochs=2, lr=0.1, batch_size=1)
    batches = [bench.batch(2, seed) for seed in range(3)]
    joined = Batch(*(torch.stack(parts) for parts in zip(*batches, strict=True)))

    def send(batch: Batch, key: Tensor) -> Tensors:
        (seen,) = observe(bench.task, ThreatModel(rule, batch_size=2), defense, bench.weights, (batch,), key)
        return seen.update

    lifted = vmap(send)(joined, keys)
    for i in range(3):
        one = send(batches[i], keys[i])
        assert all(torch.allclose(lifted[n][i], one[n], **EXACT) for n in one)


def test_what_it_did_is_on_record(bench: Any) -> None:
    batch, notes = bench.batch(2), {}
    clip = sum(sorted(norm(g) for g in by_autograd(bench, batch))) / 2  # between the two
    threat = ThreatModel(LocalSGD(epochs=3, lr=1e-9, batch_size=2), batch_size=2)
    observe(bench.task, threat, DPSGD(clip=clip), bench.weights, (batch, batch), KEY, notes=[notes, notes])
    means = {name: float(torch.stack(values).mean()) for name, values in notes.items()}
    assert means["noisy gradients"] == 6
    assert means["share of examples clipped"] == 0.5
    assert means["norm of one example's gradient"] == pytest.approx(clip, rel=1e-5)
    assert 5 < means["noise over signal, norms"] < 50  # sqrt(596) / about 2


# What it refuses.


def test_batchnorm_in_any_mode_is_refused(make_bench: Any) -> None:
    for mode in ("eval", "train_shared", "train_hidden"):
        own = make_bench("conv_norm", mode)
        with pytest.raises(Refused, match="BatchNorm"):
            private(own, DPSGD(), own.batch(2))


def test_active_dropout_is_refused(make_bench: Any) -> None:
    own = make_bench("conv_drop", None, "active")
    with pytest.raises(Refused, match="dropout"):
        private(own, DPSGD(), own.batch(2))


def test_losses_that_couple_examples_are_refused(bench: Any) -> None:
    def contrastive(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits - logits.mean(0), targets)

    def pooled(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets).mean()[None]

    assert couples(contrastive, 4)
    assert couples(pooled, 4)
    assert not couples(cross_entropy, 4)
    coupled = replace(bench, task=replace(bench.task, loss=contrastive))
    with pytest.raises(Refused, match="loss"):
        private(coupled, DPSGD(), bench.batch(2))


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.0}, {"clip": math.inf}, {"noise_multiplier": -1.0}, {"sample_rate": 0.0}, {"sample_rate": 1.1},
     {"batch": -1.0}, {"delta": 0.0}, {"delta": 1.0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        DPSGD(**options)


# The counter.


@pytest.mark.parametrize("rule", [None, LocalSGD(epochs=2, lr=0.5, batch_size=1)])
def test_the_counter_simulates_the_client_up_to_the_noise(rule: LocalSGD | None, bench: Any) -> None:
    batch, defense = bench.batch(2), DPSGD(clip=0.1, noise_multiplier=0.0)
    (counter,) = defense.counters()
    own = {} if rule is None else {"rule": rule, "belief": Simulated(rule)}
    threat = ThreatModel(batch_size=2, counter=counter, **own)
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), KEY)
    simulated = threat.simulate(bench.task, seen, batch, {}, {}, KEY)
    assert all(torch.allclose(simulated[n], seen.update[n], **EXACT) for n in simulated)
    naive = ThreatModel(batch_size=2, **own).simulate(bench.task, seen, batch, {}, {}, KEY)
    assert norm({n: naive[n] - seen.update[n] for n in naive}) > 0.1 * norm(seen.update)


def test_the_counter_states_a_law_only_where_it_has_one() -> None:
    assert DPSGD(batch=2.0).counters()[0].truth_loss == "law"
    for other in (DPSGD(), DPSGD(batch=2.0, sample_rate=0.5)):
        assert other.counters()[0].truth_loss == "none"
    with pytest.raises(NotImplementedError):
        DPSGD().counters()[0].expected_truth_loss({})


# Accounting.


@pytest.mark.parametrize(("z", "rate", "steps"), [(1.0, 1.0, 1), (1.1, 0.01, 1000), (0.8, 0.2, 50)])
@pytest.mark.filterwarnings("ignore")
def test_epsilon_is_that_of_opacus(z: float, rate: float, steps: int) -> None:
    for name, kind in (("rdp", RDPAccountant), ("prv", PRVAccountant)):
        theirs = kind()
        for _ in range(steps):
            theirs.step(noise_multiplier=z, sample_rate=rate)
        ours = DPSGD(noise_multiplier=z, sample_rate=rate).privacy(steps, 1e-5, name)
        assert ours.epsilon == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
        assert (ours.delta, ours.steps, ours.accountant) == (1e-5, steps, name)


def gaussian_epsilon(z: float, steps: int, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8), by bisection."""
    mu = math.sqrt(steps) / z

    def left(eps: float) -> float:
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))

    low, high = 0.0, mu * (mu + 40)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("z", [0.001, 0.01, 0.1, 1.0, 4.0])
def test_epsilon_is_above_the_exact_one_of_the_gaussian_mechanism_and_near_it(z: float) -> None:
    exact = gaussian_epsilon(z, 3, 1e-5)
    got = DPSGD(noise_multiplier=z).privacy(3).epsilon
    assert exact <= got < 1.25 * exact


def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise_and_delta() -> None:
    def eps(z: float = 1.0, rate: float = 0.1, steps: int = 10, delta: float = 1e-5) -> float:
        return DPSGD(noise_multiplier=z, sample_rate=rate).privacy(steps, delta).epsilon

    for values in (
        [eps(steps=s) for s in (0, 1, 10, 100)],
        [eps(rate=q) for q in (0.01, 0.1, 0.5, 1.0)],
        [eps(z=z) for z in (4.0, 1.0, 0.5, 0.1, 0.0)],
        [eps(delta=d) for d in (1e-2, 1e-5, 1e-8)],
    ):
        assert values == sorted(values)
        assert len(set(values)) == len(values)
    assert eps(steps=0) == 0.0
    assert eps(z=0.0) == math.inf


def test_the_report_is_told_all_that_epsilon_rests_on() -> None:
    text = DPSGD(clip=2.0, noise_multiplier=1.0).remark({"noisy gradients": [3.0]})
    epsilon = DPSGD(noise_multiplier=1.0).privacy(3).epsilon
    words = ("1e-05", "3 noisy gradients", "RDP", "one record", "clip 2", "multiplier 1", "rate 1")
    for word in (f"epsilon = {epsilon:.3g}", *words):
        assert word in text
    assert 'use "rdp"' in DPSGD(noise_multiplier=0.001, accountant="prv").remark({"noisy gradients": [1.0]})


# The bound on reconstruction.


def test_the_bound_has_its_closed_form_and_its_limits() -> None:
    for kappa, z, rounds in [(0.1, 1.0, 1), (0.01, 0.5, 4), (0.3, 2.0, 9)]:
        wanted = stats.norm.cdf(stats.norm.ppf(kappa) + math.sqrt(rounds) / z)
        assert DPSGD(noise_multiplier=z).success_bound(kappa, rounds) == pytest.approx(wanted, rel=1e-9)
    for q in (0.3, 1.0):
        loud, silent = DPSGD(noise_multiplier=1e6, sample_rate=q), DPSGD(noise_multiplier=0.0, sample_rate=q)
        assert loud.success_bound(0.2, 3) == pytest.approx(0.2, rel=1e-4)
        assert loud.success_bound(0.2, 0) == pytest.approx(0.2, rel=1e-9)
        assert silent.success_bound(0.2, 1) == pytest.approx(0.2 * (1 - q) + q)
        assert loud.success_bound(1.0, 3) == pytest.approx(1.0)
        assert loud.success_bound(0.0, 3) == 0.0
    grid = [DPSGD(noise_multiplier=1.0, sample_rate=q).success_bound(0.1, 5) for q in (0.05, 0.2, 0.7, 1.0)]
    assert grid == sorted(grid)


@pytest.mark.parametrize(
    ("z", "q", "rounds"), [(1.0, 1.0, 1), (1.0, 1.0, 6), (0.5, 0.3, 1), (1.0, 0.3, 6), (0.7, 0.6, 3)]
)
def test_the_bound_against_a_monte_carlo_of_the_blow_up_function(z: float, q: float, rounds: int) -> None:
    """Hayes et al. 2023, algorithm 1: the mass with the record of those outputs, of mass kappa without, that speak most
    for it.

    Of one step, or where nothing is sampled, the bound is exact; of several sampled ones it must not be below.
    """
    rng, draws, kappa = np.random.default_rng(3), 200_000, 0.05

    def ratio(x: np.ndarray) -> np.ndarray:
        return np.log1p(q * np.expm1(x / z - 0.5 / z**2)).sum(1)

    without = ratio(rng.standard_normal((draws, rounds)))
    there = rng.random((draws, rounds)) < q
    with_record = ratio(rng.standard_normal((draws, rounds)) + there / z)
    estimate = float((with_record > np.quantile(without, 1 - kappa)).mean())
    error = 0.01  # 4.5 standard errors: kappa's is 5e-4, the slope of the curve there at most 4, and 1e-3 of the share
    bound = DPSGD(noise_multiplier=z, sample_rate=q).success_bound(kappa, rounds)
    assert estimate < bound + error
    if q == 1 or rounds == 1:
        assert estimate > bound - error


def linear_problem(count: int) -> tuple[Task, Weights, Tensor]:
    """A linear model on images that are orthogonal unit vectors: each one's gradient points its own way."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    task = Task.of(model, (1, 8, 8), 4, Bounds.of((0.0,), (1.0,), torch.float64))
    images = 100 * torch.eye(64, dtype=torch.float64)[:count].reshape(count, 1, 8, 8)
    return task, weights_of(model, torch.float64), images


@pytest.mark.parametrize(("z", "q"), [(1.0, 1.0), (0.5, 1.0), (0.25, 1.0), (0.5, 0.5)])
def test_no_attack_exceeds_the_bound_and_the_best_one_comes_near(z: float, q: float) -> None:
    """The attacker knows the 10 candidates and takes the likeliest: within a factor of 1.35 of the bound, not above.

    Of orthogonal gradients the best attack succeeds with probability E[Phi(1 / z + X)^9], the bound's equal were there
    no other candidates to be mistaken for.
    """
    count, draws, label = 10, 4000, 1
    task, weights, images = linear_problem(count)
    target = torch.eye(4, dtype=torch.float64)[label][None]
    defense = DPSGD(clip=1.0, noise_multiplier=z, sample_rate=q, batch=1.0)
    clean = DPSGD(clip=1.0, noise_multiplier=0.0, batch=1.0)

    def send(image: Tensor, key: Tensor, by: Defense) -> Tensor:
        batch = Batch(image[None], target, torch.ones(1, dtype=torch.float64))
        (seen,) = observe(task, ThreatModel(), by, weights, (batch,), key)
        return seen.update["1.weight"].flatten()

    means = torch.stack([send(image, KEY, clean) for image in images])
    assert torch.allclose(means @ means.T, torch.eye(count, dtype=torch.float64), atol=1e-4)
    truth = torch.arange(draws) % count
    sent = vmap(lambda i, k: send(i, k, defense))(images[truth], split(fold_in(KEY, "clients"), draws))
    likeliest = (sent @ means.T).argmax(1)  # of one norm, so that the largest product is the nearest
    bound = defense.success_bound(1 / count, 1)
    attacks = {
        "likeliest": likeliest,
        "nearest with the signs alone": (sent.sign() @ means.T).argmax(1),
        "first": torch.zeros_like(truth),
        "least likely": (sent @ means.T).argmin(1),
    }
    hits = {name: int((guess == truth).sum()) for name, guess in attacks.items()}
    for name, right in hits.items():
        assert stats.binomtest(right, draws, bound, alternative="greater").pvalue > 1e-4, name
    assert hits["likeliest"] / draws > bound / 1.35
    found = quad(lambda x: stats.norm.pdf(x) * stats.norm.cdf(x + 1 / z) ** (count - 1), -9, 9)[0]
    exact = q * found + (1 - q) / count
    assert stats.binomtest(hits["likeliest"], draws, exact).pvalue > 1e-4


def test_two_rounds_give_the_attacker_what_the_bound_allows_for() -> None:
    """Means over rounds are as good as less noise, by the square root of their number, in attack and bound alike."""
    defense = DPSGD(noise_multiplier=2.0)
    for rounds in (1, 4, 16):
        same = DPSGD(noise_multiplier=2.0 / math.sqrt(rounds)).success_bound(0.1, 1)
        assert defense.success_bound(0.1, rounds) == pytest.approx(same, rel=1e-9)


def test_a_bound_survives_only_what_works_on_updates() -> None:
    private_one, bound = DPSGD(), DPSGD().success_bound(0.1, 2)

    class Enlarging(Defense):
        def on_gradient(self, gradient: Any, ctx: Context) -> Any:
            return gradient

    class Replacing(Defense):
        def on_batch(self, batch: Batch, ctx: Context) -> Batch:
            return batch

    pruned = DEFENSES.build("prune", rate=0.5)
    for links in ((private_one, pruned), (pruned, private_one), (private_one, pruned, DEFENSES.build("user_dp"))):
        assert chain(*links).success_bound(0.1, 2) == bound
    for other in (Enlarging(), Replacing(), DPSGD(clip=2.0)):
        assert chain(private_one, other).success_bound(0.1, 2) is None
        assert chain(other, private_one).success_bound(0.1, 2) is None
    assert chain(pruned, DEFENSES.build("user_dp")).success_bound(0.1, 2) is None
    assert chain().success_bound(0.1, 2) is None


# User-level DP.


def test_user_dp_clips_the_whole_update_and_names_the_servers_noise(bench: Any) -> None:
    update = {"a": torch.tensor([3.0, 0.0]).double(), "b": torch.tensor([[4.0]]).double()}
    defense = DEFENSES.build("user_dp", clip=0.5, noise_multiplier=2.0)
    got = defense.on_update(update, Context(bench.task, bench.weights, KEY))
    assert norm(got) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(got["b"][0, 0] / got["a"][0], torch.tensor(4 / 3).double())
    assert defense.server_noise(10) == pytest.approx(2.0 * 0.5 / 10)
    assert defense.success_bound(0.1, 1) is None
    with pytest.raises(ConfigError):
        defense.server_noise(0)
