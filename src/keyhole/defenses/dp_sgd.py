"""DP-SGD: each example's gradient is clipped, and Gaussian noise of that scale hides whether it was there at all."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.func import vmap

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import bernoulli, fold_in, normal, split, threefry2x32
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.tensors import map_tensors, safe_norm, size, squared_norm
from keyhole.core.types import Batch, GradFn, Key, LossFn, Tensors, Weights
from keyhole.errors import ConfigError, Refused, check_range
from keyhole.parts.distances import relative_l2

Accountant = Literal["rdp", "prv"]

LARGEST_PRV = 100.0
"""Above this epsilon the PRV accountant's grid no longer fits into memory, and no epsilon of this size protects."""

SMALLEST_NOISE = 1e-6
"""Noise multipliers between 0 and this have an epsilon beyond what the accountants can compute."""

_ALPHAS = tuple(1.0 + 10.0 ** (power / 4) for power in range(-24, 1))
"""Renyi orders near 1, which little noise calls for, beside Opacus's own."""


class Privacy(NamedTuple):
    """A differential-privacy guarantee and all that it rests on; neighbours differ by one record that is left out."""

    epsilon: float
    delta: float
    steps: int
    accountant: Accountant


class ClippedGradients(Counter):
    """Clip each guess's gradient as the client did and match by the likelihood of the noise.

    For independent Gaussian noise of one known scale that is the squared distance; what the scale buys beyond it is
    the weight of the prior, which a ``tune`` grid finds. The attacker takes every image to have taken part: where
    Poisson sampling left one out there is nothing to find of it.

    The law of the loss at the truth is that of a single gradient of all images; local steps add up noise, and move
    the weights at which the next gradient is taken.

    Args:
        defense: what the client does.
    """

    name = "clipped_gradients"

    def __init__(self, defense: DPSGD) -> None:
        self.defense = defense
        self.distance = relative_l2
        self.truth_loss = "law" if defense.batch > 0 and defense.sample_rate == 1 else "none"

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        """The mean of clipped gradients, without the noise."""

        def clipped(weights: Weights, batch: Batch, key: Key) -> Tensors:
            own, _, factor = clipped_gradients(gradient, weights, batch, key, self.defense.clip)
            expected = self.defense.expected(batch)
            return map_tensors(lambda g: _weighted_sum(factor, g) / expected, own)

        return clipped

    def expected_truth_loss(self, observed: Tensors) -> tuple[float, float]:
        """Mean and deviation of ``|noise|^2 / |observed|^2``: a chi-square law with n degrees of freedom."""
        if self.truth_loss != "law":
            return super().expected_truth_loss(observed)
        n, std = size(observed), self.defense.noise_multiplier * self.defense.clip / self.defense.batch
        share = std**2 * n / float(squared_norm(observed))
        return share, share * (2.0 / n) ** 0.5


@DEFENSES.add(
    name="dp_sgd",
    paper="Abadi et al. 2016, Deep Learning with Differential Privacy",
    arxiv="1607.00133",
    known_breaks=(
        "noise multipliers far below 1 keep the algorithm and lose the guarantee: epsilon is then in the hundreds or "
        "more, and the bound on reconstruction is near 1",
    ),
)
@dataclass(frozen=True)
class DPSGD(Defense):
    """Per-example clipping, sum, noise, division by the expected batch size; in every local step.

    ``g = (sum over i in S of g_i min(1, C / (|g_i| + 1e-6)) + N(0, (z C)^2 I)) / B`` with each example in S with
    probability q. The norm is over all parameters, the noise is drawn once for the sum, and an empty S sends noise.

    Unit: one record. Neighbours: with and without it, so that one record moves the sum by at most C, which is 1 / z
    standard deviations of the noise.

    Args:
        noise_multiplier: z, 0 or at least 1e-6: the noise's standard deviation on the sum in units of C.
        clip: the norm C, above 0, in units of one example's gradient.
        sample_rate: q in (0, 1], the probability with which each example takes part in a step. An audit's batch is
            what the sampling chooses from; at 1, the default, the secret always takes part, which is the worst case.
        batch: the expected batch size B that divides the sum; 0, the default, takes q times the images in the step.
        delta: of the guarantee that the report states, in [1e-12, 0.1].
        accountant: ``rdp`` or ``prv`` (tighter; epsilon up to 100), both Opacus's.

    Source: Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133, algorithm 1, which divides by the expected size
    of a lot. Differs from Opacus, where a data loader does the sampling and every layer has its own rule for
    per-example gradients: here one gradient of one example is lifted over the batch.

    Refused: BatchNorm in any mode, as one example's gradient would depend on others or on statistics that nothing
    protects; losses that couple the examples of a batch; active dropout and noise inside the model, which an attacker
    may be told for a whole batch but not for each example.
    """

    noise_multiplier: float = 1.0
    clip: float = 1.0
    sample_rate: float = 1.0
    batch: float = 0.0
    delta: float = 1e-5
    accountant: Accountant = "rdp"

    def __post_init__(self) -> None:
        if self.noise_multiplier != 0:
            check_range("noise_multiplier", self.noise_multiplier, SMALLEST_NOISE, math.inf, open_high=True)
        check_range("clip", self.clip, 0, math.inf, open_low=True, open_high=True)
        check_range("sample_rate", self.sample_rate, 0, 1, open_low=True)
        check_range("delta", self.delta, 1e-12, 0.1)
        check_range("batch", self.batch, 0, math.inf, open_high=True)

    def expected(self, batch: Batch) -> float:
        """The divisor B of a step."""
        return self.batch or self.sample_rate * batch.inputs.shape[0]

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        """The noisy mean of clipped gradients in place of the gradient."""
        _refuse(ctx.task)

        def private(weights: Weights, batch: Batch, key: Key) -> Tensors:
            # Of the round and of the step: neither may repeat the other's noise.
            own = fold_in(threefry2x32(ctx.key, key), "dp_sgd")
            each, norms, factor = clipped_gradients(gradient, weights, batch, key, self.clip)
            taking = bernoulli(fold_in(own, "sampling"), self.sample_rate, tuple(norms.shape))
            factor = torch.where(taking, factor, torch.zeros_like(factor))
            total = map_tensors(lambda g: _weighted_sum(factor, g), each)
            std = self.noise_multiplier * self.clip
            noise = {
                name: std * normal(fold_in(own, f"noise {name}"), tuple(value.shape), value.dtype)
                for name, value in total.items()
            }
            ctx.note("norm of one example's gradient", norms.mean())
            ctx.note("share of examples clipped", (norms + 1e-6 > self.clip).to(norms.dtype).mean())
            if std > 0:
                ctx.note("noise over signal, norms", safe_norm(noise) / safe_norm(total).clamp(min=1e-30))
            ctx.tally("noisy gradients")
            return map_tensors(lambda s, n: (s + n) / self.expected(batch), total, noise)

        return private

    def counters(self) -> tuple[Counter, ...]:
        """Matching clipped gradients by the noise's likelihood."""
        return (ClippedGradients(self),)

    def privacy(self, steps: int, delta: float | None = None, accountant: Accountant | None = None) -> Privacy:
        """Epsilon after ``steps`` noisy gradients, from Opacus's accountants.

        Args:
            steps: noisy gradients in which the record may take part, at least 0.
            delta: in [1e-12, 0.1]; by default that of the defense.
            accountant: ``rdp`` or ``prv``; by default that of the defense.
        """
        check_range("steps", steps, 0)
        delta, accountant = self.delta if delta is None else delta, accountant or self.accountant
        check_range("delta", delta, 1e-12, 0.1)
        epsilon = _epsilon(self.noise_multiplier, self.sample_rate, steps, delta, accountant)
        return Privacy(epsilon, delta, steps, accountant)

    def remark(self, notes: dict[str, list[float]]) -> str:
        """The guarantee for what the attacker saw, with all that it rests on."""
        steps = round(notes.get("noisy gradients", [0.0])[0])
        how = (
            f"unit: one record; clip {self.clip:g}; noise multiplier {self.noise_multiplier:g}; "
            f"sampling rate {self.sample_rate:g}"
        )
        try:
            known = self.privacy(steps)
        except ConfigError as error:
            return f"DP-SGD after {steps} noisy gradient{'s' * (steps != 1)} ({how}); {error}"
        return (
            f"DP-SGD: epsilon = {known.epsilon:.3g} at delta = {known.delta:g} after {steps} noisy "
            f"gradient{'s' * (steps != 1)} ({known.accountant.upper()} accountant; {how})."
        )

    def success_bound(self, prior: float, rounds: int) -> float:
        """No attack succeeds more often than this: the blow-up function of the sampled Gaussian mechanism.

        ``sum over k of Bin(k; T, q) Phi(Phi^-1(kappa) + sqrt(k) / z)``, for q = 1 ``Phi(Phi^-1(kappa) + sqrt(T) / z)``.

        Why: let mu_x be the law of what is sent with the record x, nu that without any record in its place, and E_x
        the outputs from which the attack succeeds on x. As nu does not know x, nu(E_x) is on average over x the
        success of a guess, at most kappa. Success is mu_x(E_x) on average. Where x takes part in k steps, one step
        moves the sum by at most C = (1 / z) standard deviations, so that by Neyman and Pearson, and for steps that
        depend on earlier ones by Gaussian composition, mu_x(E) <= Phi(Phi^-1(nu(E)) + sqrt(k) / z), which is concave
        in nu(E): the average of the left is at most the right at kappa. The reference leaves the record out and does
        not replace it, so the shift is C and not 2 C. Averaging over k, which nu does not depend on, gives the sum:
        exact for T = 1, and above the truth for more sampled steps, as it lets the attack know in which of them the
        record took part.

        All other records are taken to be known to the attacker, and the weights not to depend on the record.

        Source: Hayes, Mahloujifar and Balle 2023, https://arxiv.org/abs/2302.07225, theorem 2 and section 3, and Balle,
        Cherubin and Hayes 2022, https://arxiv.org/abs/2201.04845. Differs from them: they estimate the sampled
        mechanism's blow-up by Monte-Carlo; this closed form needs no sample and errs only upwards.

        Args:
            prior: kappa, the success of the best guess without any update, in [0, 1].
            rounds: T, noisy gradients behind what the attacker sees, at least 0.
        """
        check_range("prior", prior, 0, 1)
        check_range("rounds", rounds, 0)
        z, ks = self.noise_multiplier, range(rounds + 1)
        shifts = [math.inf if z == 0 and k else math.sqrt(k) / z if k else 0.0 for k in ks]
        reached = [1.0 if math.isinf(s) else float(stats.norm.cdf(stats.norm.ppf(prior) + s)) for s in shifts]
        likely = stats.binom.pmf(list(ks), rounds, self.sample_rate)
        return min(1.0, math.fsum(p * r for p, r in zip(likely.tolist(), reached, strict=True)))


def clipped_gradients(
    gradient: GradFn, weights: Weights, batch: Batch, key: Key, clip: float
) -> tuple[Tensors, Tensor, Tensor]:
    """Each example's gradient (b, ...), its norm over all parameters (b,), and what clipping multiplies it by (b,).

    Examples without a share in the loss are padding and get the factor 0; other shares do not count, as they would
    change how much one example can move the sum.
    """

    def one(inputs: Tensor, targets: Tensor, own: Key) -> Tensors:
        return gradient(weights, Batch(inputs[None], targets[None], inputs.new_ones(1)), own)

    each = vmap(one)(batch.inputs, batch.targets, split(key, batch.inputs.shape[0]))
    norms = vmap(safe_norm)(each)
    return each, norms, torch.clamp(clip / (norms + 1e-6), max=1.0) * (batch.share > 0).to(norms.dtype)


def _weighted_sum(factor: Tensor, each: Tensor) -> Tensor:
    return torch.tensordot(factor, each, dims=1)


def _refuse(task: Task) -> None:
    """What has no per-example gradient cannot be clipped by example."""
    if task.norms:
        raise Refused(
            f"dp_sgd: the model has BatchNorm ('{task.norms[0]}'), under which examples are not independent of each "
            "other; use a model with GroupNorm, or without normalisation."
        )
    if task.drops:
        raise Refused(f"dp_sgd: the model has active dropout ('{task.drops[0][0]}'); set model.dropout = \"off\".")
    if task.noises:
        raise Refused(f"dp_sgd: the model draws noise in '{task.noises[0][0]}'; use a chain without mid.")
    if couples(task.loss, task.num_classes):
        raise Refused(
            "dp_sgd: the loss of an example depends on the other examples of the batch, so that clipping each "
            "example's gradient is not defined; use a loss that treats examples one by one."
        )


def couples(loss: LossFn, classes: int) -> bool:
    """Whether a loss gives two examples other values together than one by one, tried on three made-up examples."""
    logits = torch.linspace(-2.0, 3.0, 3 * classes, dtype=torch.float64).sin().reshape(3, classes)
    targets = torch.eye(classes, dtype=torch.float64)[torch.arange(3) % classes]
    together = loss(logits, targets)
    alone = torch.cat([loss(logits[i : i + 1], targets[i : i + 1]).reshape(-1) for i in range(3)])
    return together.shape != alone.shape or not torch.allclose(together, alone)


@lru_cache(maxsize=256)
def _epsilon(z: float, rate: float, steps: int, delta: float, accountant: Accountant) -> float:
    if steps == 0:
        return 0.0
    if z == 0:
        return math.inf
    try:
        # Imported here: only this figure needs it, and it loads slowly.
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise ConfigError('epsilon needs Opacus: pip install "keyhole[dp]".') from error
    rdp = RDPAccountant()
    rdp.history = [(z, rate, steps)]
    with warnings.catch_warnings():
        # That the best order is the last one tried, and logarithms of 0 in tails: neither makes epsilon too small.
        warnings.simplefilter("ignore")
        epsilon = float(rdp.get_epsilon(delta, alphas=[*RDPAccountant.DEFAULT_ALPHAS, *_ALPHAS]))
        if accountant == "rdp":
            return epsilon
        if epsilon > LARGEST_PRV:
            raise ConfigError(
                f'accountant "prv" is for epsilon up to {LARGEST_PRV:g}, here it is near {epsilon:.3g}; use "rdp".'
            )
        prv = PRVAccountant()
        prv.history = [(z, rate, steps)]
        return float(prv.get_epsilon(delta))
