"""Distributions over latents: inverses, volumes by autograd, and densities against closed forms."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import grad, jacrev, vmap

from keyhole.core.keys import fold_in, new_key, normal
from keyhole.errors import ConfigError
from keyhole.inversion.posteriors import Flow, Gaussian

torch.set_num_threads(1)
F64 = torch.float64


def draws(seed, *shape):
    return normal(new_key(seed), shape, F64)


def fitted(flow, seed=0):
    return flow.fitted(2.0 * draws(seed, 400, flow.latent) + 1.0, new_key(seed))


def moved(flow, seed=0):
    """A flow away from its start: everything that began at zero is something else."""
    key = new_key(seed + 100)
    return {
        name: tensor + 0.1 * normal(fold_in(key, name), tuple(tensor.shape), F64)
        for name, tensor in fitted(flow, seed).items()
    }


SMALL = Flow(latent=8, steps=2, levels=2, hidden=6)
ODD = Flow(latent=5, steps=2, levels=2, hidden=4)


def test_a_standard_gaussian_has_half_its_dimension_and_no_slope():
    family = Gaussian(50)
    params = family.start(new_key(0))
    assert family.divergence(params, draws(1, 3, 50)) == 25.0
    slopes = grad(family.divergence)(params, draws(1, 3, 50))
    assert all(slope.abs().max() == 0 for slope in slopes.values())
    torch.testing.assert_close(family.draw(params, draws(2, 4, 50).float()), draws(2, 4, 50).float())


def test_the_gaussian_divergence_is_the_closed_form():
    params = {"mean": draws(0, 4), "factor": torch.eye(4, dtype=F64) + 0.4 * draws(1, 4, 4)}
    own = MultivariateNormal(params["mean"], params["factor"] @ params["factor"].T)
    prior = MultivariateNormal(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))
    expected = kl_divergence(own, prior) + 4 / 2
    torch.testing.assert_close(Gaussian(4).divergence(params, draws(2, 1, 4)), expected)


def test_gaussian_draws_have_its_moments():
    params = {"mean": draws(0, 3), "factor": draws(1, 3, 3)}
    z = Gaussian(3).draw(params, draws(2, 50_000, 3))
    torch.testing.assert_close(z.mean(0), params["mean"], rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(z.T), params["factor"] @ params["factor"].T, rtol=0, atol=0.1)


@pytest.mark.parametrize("flow", [SMALL, ODD, Flow(latent=50, steps=3, levels=3, hidden=10)])
def test_a_flow_goes_back_where_it_came_from(flow):
    params, noise = moved(flow), draws(3, 7, flow.latent)
    z, volume = flow.decode(params, noise)
    assert (z - noise).abs().max() > 0.1
    again, back = flow.encode(params, z)
    torch.testing.assert_close(again, noise, rtol=0, atol=1e-7)
    torch.testing.assert_close(back, -volume, rtol=0, atol=1e-7)
    torch.testing.assert_close(flow.decode(params, flow.encode(params, noise)[0])[0], noise, rtol=0, atol=1e-7)


@pytest.mark.parametrize("flow", [SMALL, ODD])
def test_the_volume_is_that_of_the_jacobian(flow):
    params = moved(flow)
    for way in (flow.encode, flow.decode):
        for row in draws(4, 3, flow.latent):
            slope = jacrev(lambda x, way=way: way(params, x[None])[0][0])(row)
            torch.testing.assert_close(torch.linalg.slogdet(slope).logabsdet, way(params, row[None])[1][0])


def test_couplings_and_shuffles_keep_volume():
    params = moved(SMALL)
    for name, tensor in params.items():
        if name in ("0.scale", "1.scale") or name.startswith("0.split"):
            params[name] = torch.zeros_like(tensor)
    z, volume = SMALL.decode(params, draws(5, 4, 8))
    assert volume.abs().max() == 0
    slope = jacrev(lambda x: SMALL.decode(params, x[None])[0][0])(draws(5, 4, 8)[0])
    assert torch.linalg.slogdet(slope).logabsdet.abs() < 1e-10
    assert (slope.abs() > 1e-3).sum() > 16  # no mere shuffle


def test_actnorm_standardises_the_batch_it_was_set_by():
    batch = 3.0 * draws(6, 300, 8) - 2.0
    params = SMALL.fitted(batch, new_key(6))
    out, _ = SMALL.encode(params, batch)
    torch.testing.assert_close(out.mean(0), torch.zeros(8, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(8, dtype=F64), rtol=0, atol=1e-4)
    # And so do the ones inside the first coupling, on what they saw.
    x = (batch + params["0.shift"][0]) * params["0.scale"][0].exp()
    inside = x[:, SMALL._orders[0][0]][:, :4] @ params["0.in"][0].T
    inside = (inside + params["0.in.shift"][0]) * params["0.in.scale"][0].exp()
    torch.testing.assert_close(inside.mean(0), torch.zeros(6, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(inside.var(0, correction=0), torch.ones(6, dtype=F64), rtol=0, atol=1e-3)
    inside = torch.nn.functional.elu(inside) @ params["0.mid"][0].T
    inside = (inside + params["0.mid.shift"][0]) * params["0.mid.scale"][0].exp()
    torch.testing.assert_close(inside.var(0, correction=0), torch.ones(6, dtype=F64), rtol=0, atol=1e-3)


def test_a_flow_without_couplings_is_the_gaussian_it_must_be():
    # Couplings and splits begin at zero, and what is left is affine.
    params = fitted(ODD)
    origin = ODD.decode(params, torch.zeros(1, 5, dtype=F64))[0][0]
    matrix = jacrev(lambda x: ODD.decode(params, x[None])[0][0])(torch.zeros(5, dtype=F64))
    expected = MultivariateNormal(origin, matrix @ matrix.T).log_prob(draws(7, 6, 5))
    torch.testing.assert_close(ODD.log_density(params, draws(7, 6, 5)), expected)


def test_a_density_integrates_to_one():
    flow = Flow(latent=2, steps=2, levels=1, hidden=4)
    params = moved(flow, 1)
    side = torch.linspace(-25.0, 25.0, 801, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    mass = flow.log_density(params, grid).exp().sum() * (side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=1e-3)


def test_the_divergence_of_a_flow_is_a_mean_of_log_densities():
    params, noise = moved(SMALL), draws(8, 20, 8)
    z = SMALL.draw(params, noise)
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(SMALL.divergence(params, noise), (SMALL.log_density(params, z) - prior).mean())
    # Affine, it is that of two Gaussians.
    params, noise = fitted(ODD), draws(9, 200_000, 5)
    origin = ODD.decode(params, torch.zeros(1, 5, dtype=F64))[0][0]
    matrix = jacrev(lambda x: ODD.decode(params, x[None])[0][0])(torch.zeros(5, dtype=F64))
    prior = MultivariateNormal(torch.zeros(5, dtype=F64), torch.eye(5, dtype=F64))
    exact = kl_divergence(MultivariateNormal(origin, matrix @ matrix.T), prior)
    assert float(ODD.divergence(params, noise)) == pytest.approx(float(exact), rel=0.01)


def test_a_flow_starts_near_the_prior():
    flow = Flow(latent=50, steps=2, levels=3, hidden=8)
    params = flow.start(new_key(3))
    assert abs(float(flow.divergence(params, draws(10, 200, 50).float()))) < 0.2
    assert {tensor.dtype for tensor in params.values()} == {torch.float32}


def test_flows_lift_over_classes():
    keys = torch.stack([fold_in(new_key(4), place) for place in range(3)])
    lifted = vmap(SMALL.start)(keys)
    noise = draws(11, 6, 3, 8).float()
    made = vmap(SMALL.draw, in_dims=(0, 1), out_dims=1)(lifted, noise)
    for place in range(3):
        own = SMALL.start(keys[place])
        for name, tensor in own.items():
            torch.testing.assert_close(lifted[name][place], tensor)
        torch.testing.assert_close(made[:, place], SMALL.draw(own, noise[:, place]))
    assert not torch.equal(lifted["0.in"][0], lifted["0.in"][1])


def test_a_flow_that_cannot_halve_so_often_is_refused():
    with pytest.raises(ConfigError, match="use fewer flow_levels"):
        Flow(latent=7, levels=3)
    with pytest.raises(ConfigError, match="flow_steps"):
        Flow(latent=8, steps=0)
