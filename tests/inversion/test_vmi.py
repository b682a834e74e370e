"""Variational model inversion, on a linear generator and a linear target whose best posterior is known."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad

from keyhole.core.inversion import Target
from keyhole.core.keys import advance, fold_in, new_key, normal
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.tensors import flatten, unflatten
from keyhole.errors import ConfigError
from keyhole.experiment.inversion_plan import read_inverting
from keyhole.experiment.sections import DataSection, ModelSection
from keyhole.inversion.gan import GAN, Discriminator, Facts, Generator
from keyhole.inversion.identity import FEATURES
from keyhole.inversion.vmi import VMI
from keyhole.solve.invert import invert

torch.set_num_threads(1)
F64 = torch.float64
LATENT, PIXELS, CLASSES = 4, 4, 3


def draws(seed, *shape):
    return normal(new_key(seed), shape, F64)


def linear_target(classes=CLASSES, dtype=F64):
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES)).to(dtype)
    model[1].weight.data = draws(1, CLASSES, PIXELS).to(dtype)
    model[1].bias.data = draws(2, CLASSES).to(dtype)
    if classes < CLASSES:
        model[1].weight.data, model[1].bias.data = model[1].weight.data[:classes], model[1].bias.data[:classes]
    task = Task.of(model, (1, 2, 2), classes, Bounds.of((0.0,), (1.0,), dtype))
    return Target(task, weights_of(model, dtype))


def linear_prior(dtype=F64):
    model = nn.Sequential(nn.Linear(LATENT, PIXELS), nn.Unflatten(1, (1, 2, 2))).to(dtype)
    model[0].weight.data, model[0].bias.data = draws(3, PIXELS, LATENT).to(dtype), draws(4, PIXELS).to(dtype)
    return GAN(Generator.of(model, LATENT), Discriminator.of(nn.Identity()), Facts(1, (), 0.0, True))


def vmi(**changed):
    return VMI(**{"gan_latent": LATENT, "draws": 4, "steps": 3, "lr": 0.05, "flow_levels": 1, "flow_steps": 2,
                  "flow_hidden": 5, **changed})  # fmt: skip


def descended(method, target, facts, steps, average=0):
    """The engine's loop without its lift; the mean of the last candidates."""
    prior = linear_prior()
    start = {name: tensor.to(F64) for name, tensor in method.start(target, prior, new_key(5)).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    state, kept = method.optimizer.init(flatten(start)), []
    slope = grad(lambda x, key: method.loss(target, prior, facts, unflatten(x, shapes), key))
    for tick in range(steps):
        x = method.optimizer.propose(state)
        kept.append(x)
        state = method.optimizer.update(state, torch.zeros(()), slope(x, advance(new_key(6), tick)), tick, lambda x: x)
    return unflatten(torch.stack(kept[-(average or 1) :]).mean(0), shapes)


def test_the_best_gaussian_of_a_quadratic_loss_is_the_posterior():
    # With LOMMA's loss and a linear world, E[L] + kl * KL is quadratic in m, and L only meets traces and its log-det.
    kl, target, prior = 0.3, linear_target(), linear_prior()
    facts = {FEATURES: draws(7, PIXELS)}
    matrix, offset = prior.generator.module[0].weight.data, prior.generator.module[0].bias.data
    precision = 2 / PIXELS * matrix.T @ matrix + kl * torch.eye(LATENT, dtype=F64)
    rows = target.weights.params["1.weight"]
    mean = torch.linalg.solve(precision, matrix.T @ (rows + 2 / PIXELS * (facts[FEATURES] - offset)).T).T
    covariance = kl * torch.linalg.inv(precision)
    method = vmi(identity="logit", kl=kl, draws=64, lr=0.02)
    found = descended(method, target, facts, 400, average=200)
    torch.testing.assert_close(found["mean"], mean, rtol=0, atol=0.05)
    for factor in found["factor"]:
        torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=0.05)
    assert (covariance - torch.eye(LATENT, dtype=F64)).abs().max() > 0.3


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_without_identity_the_divergence_pulls_to_the_prior(posterior):
    method = vmi(weight=0.0, kl=1.0, posterior=posterior, draws=64, lr=0.01)
    target, prior = linear_target(dtype=torch.float32), linear_prior(torch.float32)
    start = method.start(target, prior, new_key(8))
    candidate = {name: tensor + 0.2 * normal(fold_in(new_key(9), name), tuple(tensor.shape))
                 for name, tensor in start.items()}  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in candidate.items()}
    noise = normal(new_key(10), (2000, CLASSES, LATENT))

    def moments(params):
        z = torch.func.vmap(method.family.draw, in_dims=(0, 1), out_dims=1)(params, noise)
        return z.mean(0).abs().max(), max((torch.cov(z[:, k].T) - torch.eye(LATENT)).abs().max() for k in range(3))

    assert max(moments(candidate)) > 0.5
    state = method.optimizer.init(flatten(candidate))
    slope = grad(lambda x, key: method.loss(target, prior, {}, unflatten(x, shapes), key))
    for tick in range(200):
        x = method.optimizer.propose(state)
        state = method.optimizer.update(state, torch.zeros(()), slope(x, advance(new_key(6), tick)), tick, lambda x: x)
    assert max(moments(unflatten(method.optimizer.propose(state), shapes))) < 0.2


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_classes_do_not_meet(posterior):
    # Two classes of the same network: what one does is the same whatever the other's distribution is.
    method, target, prior = vmi(posterior=posterior, hsic="diversity", draws=8), linear_target(), linear_prior()
    candidate = {name: tensor.double() for name, tensor in method.start(target, prior, new_key(11)).items()}
    other = {name: torch.cat([tensor[:1], tensor[1:] + 0.1]) for name, tensor in candidate.items()}
    slopes = [grad(lambda c: method.loss(target, prior, {}, c, new_key(12)))(c) for c in (candidate, other)]
    for name in candidate:
        torch.testing.assert_close(slopes[0][name][0], slopes[1][name][0], rtol=0, atol=1e-10)
    assert any((slopes[0][name][1:] - slopes[1][name][1:]).abs().max() > 1e-6 for name in candidate)


def test_the_loss_is_a_mean_over_draws_and_a_sum_over_classes():
    method, target, prior = vmi(kl=0.7, weight=2.0), linear_target(), linear_prior()
    candidate = {"mean": draws(13, CLASSES, LATENT), "factor": torch.eye(LATENT, dtype=F64) + draws(14, 3, 4, 4) / 5}
    key = new_key(15)
    noise = normal(fold_in(key, "z"), (4, CLASSES, LATENT), F64)
    expected = 0.0
    for k in range(CLASSES):
        mean, factor = candidate["mean"][k], candidate["factor"][k]
        images = prior.generator(mean + noise[:, k] @ factor.T)
        expected += 2.0 * nn.functional.cross_entropy(target.logits(images), torch.full((4,), k))
        expected += 0.35 * (mean @ mean + factor.square().sum() - torch.logdet(factor @ factor.T))
    torch.testing.assert_close(method.loss(target, prior, {}, candidate, key), expected)


def test_the_engine_draws_as_many_images_as_asked_and_repeats_itself():
    target, prior = linear_target(dtype=torch.float32), linear_prior(torch.float32)
    public = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for posterior in ("gaussian", "flow"):
        method = vmi(posterior=posterior, steps=40, final=2)
        runs = [invert(method, target.task, [target.weights], prior, public, 6, [new_key(s)])[0] for s in (0, 0, 1)]
        first, again, other = runs
        assert first.images.shape == (CLASSES, 6, 1, 2, 2)
        assert first.searches == 1
        assert torch.equal(first.images, again.images)
        assert not torch.equal(first.images, other.images)
        before = invert(vmi(posterior=posterior, steps=1, lr=1e-9, final=2), target.task, [target.weights], prior,
                        public, 6, [new_key(0)])[0]  # fmt: skip
        assert first.losses[-1] < first.losses[0]
        assert first.confidence.mean() > before.confidence.mean()


def test_a_file_names_its_options():
    raw = {
        "public": [{"classes": [5, 6]}],
        "attacks": [{"name": "vmi", "posterior": "flow", "flow_steps": 2, "hsic": "faithful"}],
    }
    data, model = DataSection(name="digits", classes=[0, 1]), ModelSection(name="mcnn")
    plan = read_inverting(copy.deepcopy(raw), data, model, 3)
    options = plan.attacks[0].asdict()
    assert (options["posterior"], options["flow_steps"], options["lr"]) == ("flow", 2, 1e-4)
    written = {key: value for key, value in plan.asdict().items() if key in ("public", "attacks")}
    assert read_inverting(written, data, model, 3).attacks == plan.attacks
    assert VMI(**options).family.steps == 2
    for wrong, said in (({"posterior": "mixture"}, "gaussian"), ({"draws": 0}, "draws"), ({"lr": 0.0}, "lr")):
        raw["attacks"] = [{"name": "vmi", **wrong}]
        with pytest.raises(ConfigError, match=said):
            read_inverting(raw, data, model, 3)


def test_a_term_within_classes_needs_draws():
    with pytest.raises(ConfigError, match="set draws to 8"):
        vmi(hsic="faithful", draws=4)
    with pytest.raises(ConfigError, match="fewer flow_levels"):
        vmi(posterior="flow", flow_levels=3)
