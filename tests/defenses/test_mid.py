"""MID's bottleneck: its divergence, its noise, its new weights, and what attackers make of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, linear, softplus

from keyhole.core.defense import Context, Counter, chain, defended_gradient
from keyhole.core.keys import fold_in, new_key, split
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task, fit_weights
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Tensors, Weights
from keyhole.defenses.clip import Clip
from keyhole.defenses.concealing import Concealing
from keyhole.defenses.dp_sgd import DPSGD
from keyhole.defenses.mid import MID, FoundNoise, MeanNoise, divergence
from keyhole.errors import ConfigError, ModelError, Refused
from keyhole.experiment.plan import Group
from keyhole.experiment.run import run_group
from keyhole.federation.local import LocalTraining, train_round
from keyhole.federation.norms import evaluating
from keyhole.federation.states import accuracy

KEY = new_key(17)


def with_bottleneck(bench: Any, defense: MID | None = None) -> Any:
    return bench.under(defense or MID())


def test_the_divergence_of_known_gaussians() -> None:
    one, zero = torch.ones(3, 128).double(), torch.zeros(3, 128).double()
    assert torch.allclose(divergence(zero, one), torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(divergence(one, one), torch.full((3,), 64.0).double(), atol=1e-4)
    mean, deviation = torch.randn(3, 5).double(), torch.rand(3, 5).double() + 0.1
    given = torch.distributions.Normal(mean, deviation)
    standard = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    expected = torch.distributions.kl_divergence(given, standard).sum(-1)
    assert torch.allclose(divergence(mean, deviation), expected, atol=1e-5)
    assert bool(divergence(mean, torch.zeros(3, 5).double()).isfinite().all())


def by_hand(w: Tensors, batch: Batch, noise: Tensor, beta: float) -> Tensor:
    """The objective of the `mlp` of the tests, written out."""
    r = torch.sigmoid(linear(batch.inputs.flatten(1), w["1.weight"], w["1.bias"]))
    encoded = linear(r, w["3.encode.weight"], w["3.encode.bias"])
    mu, sigma = encoded[:, :12], softplus(encoded[:, 12:] - 5)
    logits = linear(mu + sigma * noise, w["3.head.weight"], w["3.head.bias"])
    lost = -0.5 * (1 + 2 * torch.log(sigma + 1e-7) - mu**2 - sigma**2).sum(1).mean()
    return cross_entropy(logits, batch.targets.argmax(1)) + beta * lost


def test_the_gradient_by_hand(make_bench: Any) -> None:
    defense, plain = MID(beta=0.3), make_bench("mlp")
    bench = with_bottleneck(plain, defense)
    assert bench.task.head == "3.head"
    batch = bench.batch(3)
    noise = bench.task.masks(KEY, 3)["3.sample.noise"]
    assert noise.shape == (3, 12)
    params = {n: p.clone().requires_grad_(True) for n, p in bench.weights.params.items()}
    assert list(params) == [
        "1.weight", "1.bias", "3.encode.weight", "3.encode.bias", "3.head.weight", "3.head.bias"
    ]  # fmt: skip
    expected = torch.autograd.grad(by_hand(params, batch, noise.double(), 0.3), list(params.values()))
    ctx = Context(bench.task, bench.weights, KEY)
    got = defended_gradient(bench.task, defense, ctx)(bench.weights, batch, KEY)
    assert all(torch.allclose(got[n], e, rtol=1e-9, atol=1e-12) for n, e in zip(params, expected, strict=True))
    (lost,) = ctx.notes["divergence of the bottleneck"]
    assert lost.shape == (3,)


def test_noise_is_standard_normal_and_fresh_for_each_example_and_key(make_bench: Any) -> None:
    task = with_bottleneck(make_bench("mlp")).task
    drawn = task.masks(KEY, 500)["3.sample.noise"]
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, task.masks(KEY, 500)["3.sample.noise"])
    assert not torch.equal(drawn, task.masks(fold_in(KEY, 1), 500)["3.sample.noise"])
    assert task.draws == ("3.sample",)


def test_dropout_and_noise_are_drawn_side_by_side(make_bench: Any) -> None:
    plain = make_bench("conv_drop", dropout="active")
    bench = with_bottleneck(plain)
    both, before = bench.task.masks(KEY, 3), plain.task.masks(KEY, 3)
    assert both.keys() == {"2.mask", "4.mask", "5.sample.noise"}
    assert all(torch.equal(both[n], before[n]) for n in before), "dropout is drawn as it was"


def test_new_weights_are_the_same_everywhere_and_follow_the_usual_law(make_bench: Any) -> None:
    plain = make_bench("mlp")
    torch.manual_seed(1)
    one = with_bottleneck(plain)
    torch.manual_seed(2)
    two = with_bottleneck(plain)
    encode = one.weights.params["3.encode.weight"]
    assert encode.shape == (24, 24)
    assert encode.dtype == torch.float64
    assert all(torch.equal(p, two.weights.params[n]) for n, p in one.weights.params.items())
    assert all(one.weights.params[n] is plain.weights.params[n] for n in ("1.weight", "1.bias"))
    bound = 1 / math.sqrt(24)
    assert stats.kstest(encode.flatten().numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    assert float(one.weights.params["3.head.bias"].abs().max()) <= 1 / math.sqrt(12)
    assert with_bottleneck(plain, MID(width=5)).weights.params["3.encode.weight"].shape == (10, 24)


def test_weights_that_fit_are_left_alone(bench: Any, norm_bench: Any, make_bench: Any) -> None:
    for own in (bench, norm_bench, make_bench("conv_drop", dropout="active")):
        assert fit_weights(own.task, own.weights) is own.weights
    changed = with_bottleneck(norm_bench)
    assert fit_weights(changed.task, changed.weights) is changed.weights
    assert changed.weights.buffers.keys() == norm_bench.weights.buffers.keys()
    assert all(changed.weights.buffers[n] is norm_bench.weights.buffers[n] for n in norm_bench.weights.buffers)
    # Back to the plain model: what the bottleneck added is dropped, and the head is the task's own.
    back = fit_weights(norm_bench.task, changed.weights)
    assert back.params.keys() == norm_bench.weights.params.keys()
    assert torch.equal(back.params["4.weight"], norm_bench.task.model.get_submodule("4").weight.detach())


def test_a_task_is_changed_once_and_the_given_one_never(bench: Any) -> None:
    once = MID().on_task(bench.task)
    assert MID(width=3).on_task(once) is once
    assert bench.task.head == "3"
    assert isinstance(bench.task.model.get_submodule("3"), nn.Linear)
    assert chain(MID(), MID()).on_task(bench.task).head == "3.head"


def test_tests_use_the_mean_or_one_draw(make_bench: Any) -> None:
    inputs = make_bench("mlp").batch(40).inputs
    labels = torch.arange(40) % 4
    for eval_mean in (True, False):
        bench = with_bottleneck(make_bench("mlp"), MID(eval_mean=eval_mean))
        # A deviation so large that any noise decides.
        loud = {n: p + 1e6 * (n == "3.encode.bias") * (torch.arange(24) >= 12) for n, p in bench.weights.params.items()
                if n == "3.encode.bias"}  # fmt: skip
        weights = Weights({**bench.weights.params, **loud}, bench.weights.buffers)
        task = evaluating(bench.task)
        assert bool(task.draws) != eval_mean
        by_mean = task.logits(weights, inputs).argmax(-1)
        quiet = float((by_mean == labels).double().mean())
        found = accuracy(bench.task, weights, inputs, labels)
        assert found == accuracy(bench.task, weights, inputs, labels)
        assert (found == quiet) == eval_mean


def test_accuracy_without_noise_is_that_of_the_logits(bench: Any) -> None:
    batch = bench.batch(30)
    expected = (bench.task.logits(bench.weights, batch.inputs).argmax(-1) == batch.targets.argmax(-1)).double().mean()
    assert accuracy(bench.task, bench.weights, batch.inputs, batch.targets.argmax(-1)) == float(expected)


# Attackers


def test_each_attacker_takes_the_noise_for_something_else(make_bench: Any) -> None:
    defense = MID()
    bench = with_bottleneck(make_bench("mlp"), defense)
    secret = bench.batch(2)
    mean, found = defense.counters()
    unknown, like = {}, secret.inputs
    for counter in (Counter(), mean, found):
        threat = ThreatModel(batch_size=2, counter=counter)
        unknown[counter.name] = threat.unknowns(bench.task, like, KEY)
        told = replace(threat, sees=frozenset({"weights", "update", "masks"}))
        assert told.unknowns(bench.task, like, KEY) == {}
    assert unknown["naive"] == {} == unknown["mean_noise"]
    (start,) = unknown["found_noise"].values()
    assert start.shape == (2, 12)
    assert not start.any()

    (seen,) = observe(bench.task, ThreatModel(batch_size=2), defense, bench.weights, (secret,), KEY)
    noise = bench.task.masks(fold_in(fold_in(KEY, 0), "client"), 2)["3.sample.noise"].double()

    def off(counter: Counter, unknowns: Tensors, **told: Any) -> float:
        threat = ThreatModel(batch_size=2, counter=counter)
        simulated = threat.simulate(bench.task, seen._replace(**told), secret, {}, unknowns, KEY)
        return max(float((simulated[n] - seen.update[n]).abs().max()) for n in seen.update)

    assert off(found, {"mask.3.sample.noise": noise}) < 1e-9
    assert off(mean, {}, masks={"3.sample.noise": noise}) < 1e-9
    assert 1e-5 < off(mean, {}) < off(Counter(), {})
    assert off(found, {"mask.3.sample.noise": torch.zeros(2, 12).double()}) == off(mean, {})


def test_promises_of_the_truth_end_with_the_first_draw() -> None:
    for counter in (MeanNoise(MID()), FoundNoise(MID())):
        assert counter.truth_stays(1, 1)
        assert counter.truth_stays(1, 3)
        assert not counter.truth_stays(2, 1)
        assert not counter.truth_stays(1, 1, 2)
    assert chain(MID(), Clip()).counters()[1].finds_noise
    assert not chain(MID(), Clip()).counters()[0].finds_noise


@pytest.mark.parametrize("attacker", ["naive", "adaptive:mean_noise", "adaptive:found_noise", "check:truth"])
def test_an_audit_runs_from_plain_weights(attacker: str, make_setup: Any, make_trial: Any) -> None:
    setup = make_setup(model="mlp")
    sees = ("targets", "update", "weights")
    options = {"steps": 30, "labels": "given"}
    trial = make_trial("idlg", options, (0, 1), (("mid", {}),), attacker=attacker, batch_size=2, sees=sees)
    (outcome,) = run_group(Group((trial,)), setup).outcomes
    assert outcome.status in ("budget", "converged"), outcome.detail
    if attacker == "check:truth":
        assert outcome.facts["truth_loss"] < 1e-12


# Training


def test_clients_train_the_bottleneck(make_bench: Any) -> None:
    bench = with_bottleneck(make_bench("conv_norm", batchnorm="train_shared"))
    batch, parts = bench.batch(12), (torch.arange(7), torch.arange(7, 12))
    given = (bench.task, bench.weights, batch.inputs, batch.targets, parts, LocalTraining(batch_size=4), KEY)
    rounds = [train_round(*given, defense=MID(), together=width) for width in (1, 2)]
    for name, before in bench.weights.params.items():
        one, two = (r.weights.params[name] for r in rounds)
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-11)
        # A bias before BatchNorm moves nothing.
        assert name == "0.bias" or not torch.equal(one[0], before)
    bare = train_round(*given)
    assert not torch.allclose(bare.weights.params["4.encode.bias"], rounds[0].weights.params["4.encode.bias"])


def test_lifted_keys_draw_what_single_ones_do(make_bench: Any) -> None:
    task = with_bottleneck(make_bench("mlp")).task
    keys = split(KEY, 3)
    drawn = vmap(lambda key: task.masks(key, 2))(keys)
    for i, key in enumerate(keys):
        assert torch.equal(drawn["3.sample.noise"][i], task.masks(key, 2)["3.sample.noise"])


def test_a_step_of_local_sgd_draws_its_own_noise(make_bench: Any) -> None:
    bench = with_bottleneck(make_bench("mlp"), MID(beta=0.0))
    secret = bench.batch(2)
    rule = LocalSGD(2, 0.1, 2)
    (seen,) = observe(bench.task, ThreatModel(rule, batch_size=2), MID(beta=0.0), bench.weights, (secret,), KEY)
    client, here = fold_in(fold_in(KEY, 0), "client"), bench.weights.params
    for step in range(2):
        noise = bench.task.masks(fold_in(client, f"step {step}"), 2)["3.sample.noise"].double()
        params = {n: p.clone().requires_grad_(True) for n, p in here.items()}
        slopes = torch.autograd.grad(by_hand(params, secret, noise, 0.0), list(params.values()))
        here = {n: p - 0.1 * s for (n, p), s in zip(here.items(), slopes, strict=True)}
    assert all(torch.allclose(seen.update[n], bench.weights.params[n] - here[n], rtol=1e-8, atol=1e-12) for n in here)


# Refused


def test_what_it_does_not_go_with(make_bench: Any) -> None:
    bench = make_bench("mlp")
    for other, words in ((DPSGD(), "draws noise in '3.sample'"), (Concealing(), "no noise inside the model")):
        defense = chain(MID(), other)
        task = defense.on_task(bench.task)
        with pytest.raises(Refused, match=words):
            observe(task, ThreatModel(), defense, fit_weights(task, bench.weights), (bench.batch(),), KEY, bench.public)
    with pytest.raises(ModelError, match="no bottleneck"):
        observe(bench.task, ThreatModel(), MID(), bench.weights, (bench.batch(),), KEY)


class Positions(nn.Module):
    """Decides at each position and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (b, k) of images (b, 1, 8, 8)."""
        return self.head(inputs[:, 0]).mean(1)


@pytest.mark.parametrize("model", [Positions(), nn.Linear(8, 4)])
def test_heads_that_read_something_else_than_a_vector(model: nn.Module) -> None:
    if isinstance(model, nn.Linear):
        task = Task.of(model, (8,), 4, Bounds.of((0.0,), (1.0,)))
    else:
        task = Task.of(model, (1, 8, 8), 4, Bounds.of((0.0,), (1.0,)))
    with pytest.raises(ModelError, match="head"):
        MID().on_task(task)


def test_wrong_options_are_refused() -> None:
    for options in ({"beta": -0.1}, {"width": -1}, {"beta": math.inf}):
        with pytest.raises(ConfigError):
            MID(**options)  # type: ignore[arg-type]
