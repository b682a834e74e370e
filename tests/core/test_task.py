"""Tasks: what is refused, where the head is, that nothing is ever changed, and gradients against torch.autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from keyhole.core.keys import fold_in, new_key, normal, uniform
from keyhole.core.task import Bounds, Task, cross_entropy, plain_gradient, weights_of
from keyhole.core.types import Batch, Weights
from keyhole.errors import ConfigError, ModelError

PIXELS = Bounds.of((0.0,), (1.0,), torch.float64)
KEY = new_key(3)


class HeadFirst(nn.Module):
    """The head is defined first and runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(6, 3)
        self.extra = nn.Linear(16, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(torch.tanh(self.extra(inputs.flatten(1))))


def of(model: nn.Module, **modes: Any) -> Task:
    return Task.of(model.double(), (1, 4, 4), 3, PIXELS, **modes)


def fingerprint(model: nn.Module) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    grads = [p.grad is None for p in model.parameters()]
    return state, modes, hooks, wanted, grads


def same(a: Any, b: Any) -> bool:
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][n], b[0][n]) for n in a[0])


def test_the_head_is_the_linear_layer_that_runs_last() -> None:
    assert of(HeadFirst()).head == "classify"


@pytest.mark.parametrize(
    ("layer", "words"),
    [(nn.BatchNorm1d(16), 'model.batchnorm = "eval"'), (nn.Dropout(0.5), 'model.dropout = "off"')],
)
def test_a_layer_with_modes_is_refused_until_its_mode_is_named(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(16, 3))
    with pytest.raises(ModelError) as caught:
        of(model)
    assert words in str(caught.value)
    mode = {"batchnorm": "eval"} if isinstance(layer, nn.BatchNorm1d) else {"dropout": "off"}
    assert of(model, **mode).head == "2"


@pytest.mark.parametrize(
    "modes", [{"batchnorm": "train"}, {"dropout": "on"}, {"batchnorm": "eval", "dropout": "train"}]
)
def test_a_mode_that_is_not_known_is_refused(modes: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="accepted"):
        of(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), **modes)


def test_batchnorm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 3))
    with pytest.raises(ModelError, match="running statistics"):
        of(model, batchnorm="eval")


def test_batchnorm_parameters_are_known_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    assert of(model, batchnorm="eval").norm_params == {"1.weight", "1.bias"}
    assert of(HeadFirst()).norm_params == frozenset()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(15, 3)), "does not accept inputs of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "logits of shape"),
        (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), "no linear layer"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 3, 3), nn.Flatten()),
            "has 9 outputs",
        ),
    ],
)
def test_models_that_cannot_be_audited_are_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        of(model)


def test_a_parameter_that_does_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    with pytest.raises(ModelError, match="'idle' does not influence the logits"):
        of(model)


def test_the_users_model_is_copied_and_never_changed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)).double().train()
    before = fingerprint(model)
    task = of(model, batchnorm="eval", dropout="off")
    inputs = normal(KEY, (2, 1, 4, 4), torch.float64)
    weights = weights_of(task.model, torch.float64)
    task.trace(weights, inputs)
    plain_gradient(task)(weights, Batch(inputs, torch.eye(3).double()[:2], torch.full((2,), 0.5).double()), KEY)
    assert same(before, fingerprint(model))
    assert task.model is not model


def test_a_trace_changes_nothing_even_if_it_raises(norm_bench: Any) -> None:
    task, weights = norm_bench.task, norm_bench.weights
    inputs = norm_bench.batch(2).inputs
    before = fingerprint(task.model)
    task.trace(weights, inputs)
    assert same(before, fingerprint(task.model))
    with pytest.raises(RuntimeError):
        task.trace(weights, inputs[:, :, :3, :3])
    after = fingerprint(task.model)
    assert same(before, after)
    assert sum(after[2]) == 0


def test_a_trace_tells_what_happened_inside(bench: Any) -> None:
    task, weights, inputs = bench.task, bench.weights, bench.batch(3).inputs
    trace = task.trace(weights, inputs)
    p = weights.params
    conv = torch.conv2d(inputs, p["0.weight"], p["0.bias"], stride=2, padding=1)
    features = conv.sigmoid().flatten(1)
    assert torch.allclose(trace.features, features, rtol=1e-13)
    assert torch.allclose(trace.logits, features @ p["3.weight"].T + p["3.bias"], rtol=1e-12)
    assert torch.allclose(trace.activations["0"], conv, rtol=1e-13)
    assert set(trace.activations) == {"0", "1", "2", "3"}
    assert torch.equal(task.logits(weights, inputs), trace.logits)


def test_batchnorm_in_eval_mode_uses_the_buffers_it_is_given(norm_bench: Any) -> None:
    task, weights, inputs = norm_bench.task, norm_bench.weights, norm_bench.batch(3).inputs
    p, b = weights
    conv = torch.conv2d(inputs, p["0.weight"], p["0.bias"], stride=2, padding=1)
    as_row = (1, 8, 1, 1)
    spread = (b["1.running_var"] + 1e-5).sqrt().reshape(as_row)
    scaled = (conv - b["1.running_mean"].reshape(as_row)) / spread * p["1.weight"].reshape(as_row)
    expected = (scaled + p["1.bias"].reshape(as_row)).sigmoid().flatten(1) @ p["4.weight"].T + p["4.bias"]
    assert torch.allclose(task.logits(weights, inputs), expected, rtol=1e-11)
    one = torch.stack([task.logits(weights, i[None])[0] for i in inputs])
    assert torch.allclose(one, expected, rtol=1e-11)


def test_weights_are_a_copy_in_the_wanted_precision() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    weights = weights_of(model, torch.float64)
    assert {t.dtype for t in weights.params.values()} == {torch.float64}
    assert weights.buffers["1.num_batches_tracked"].dtype == torch.int64
    weights.params["2.bias"].fill_(7.0)
    assert not (model[2].bias == 7.0).any()
    assert not any(t.requires_grad for t in weights.params.values())


def reference_gradient(model: nn.Module, weights: Weights, batch: Batch) -> dict[str, Tensor]:
    """By a loaded module and torch.autograd, example by example."""
    own = copy.deepcopy(model).eval()
    own.load_state_dict({**weights.params, **weights.buffers})
    total = sum(
        share * torch.nn.functional.cross_entropy(own(image[None]), target[None])
        for image, target, share in zip(*batch, strict=True)
    )
    names = [name for name, _ in own.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, list(own.parameters())), strict=True))


@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_the_plain_gradient_is_that_of_autograd(which: str, request: pytest.FixtureRequest) -> None:
    own = request.getfixturevalue(which)
    batch = own.batch(3)._replace(
        targets=torch.softmax(normal(KEY, (3, 4), torch.float64), -1), share=torch.tensor([0.5, 0.2, 0.3]).double()
    )
    got = plain_gradient(own.task)(own.weights, batch, KEY)
    expected = reference_gradient(own.task.model, own.weights, batch)
    assert list(got) == list(expected)
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=1e-10, atol=1e-14), name


def test_a_share_of_zero_is_padding(bench: Any) -> None:
    batch = bench.batch(2)
    padded = Batch(
        torch.cat([batch.inputs, batch.inputs[:1] + 9]),
        torch.cat([batch.targets, batch.targets[1:]]),
        torch.cat([batch.share, torch.zeros(1).double()]),
    )
    gradient = plain_gradient(bench.task)
    plain, with_padding = gradient(bench.weights, batch, KEY), gradient(bench.weights, padded, KEY)
    assert all(torch.allclose(plain[n], with_padding[n], rtol=1e-12, atol=1e-16) for n in plain)


def test_the_plain_gradient_lifts(norm_bench: Any) -> None:
    trials = norm_bench.secrets(3, 2)[0]
    gradient = plain_gradient(norm_bench.task)
    lifted = vmap(lambda b: gradient(norm_bench.weights, b, KEY))(trials)
    for i in range(3):
        one = gradient(norm_bench.weights, norm_bench.batch(2, i), KEY)
        assert all(torch.allclose(lifted[n][i], one[n], rtol=1e-10, atol=1e-14) for n in one)


def test_cross_entropy_with_soft_targets_is_that_of_torch() -> None:
    logits = 3 * normal(fold_in(KEY, "l"), (5, 4), torch.float64)
    targets = torch.softmax(normal(fold_in(KEY, "t"), (5, 4), torch.float64), -1)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(cross_entropy(logits, targets), expected, rtol=1e-12)
    hard = torch.tensor([0, 1, 2, 3, 0])
    expected = torch.nn.functional.cross_entropy(logits, hard, reduction="none")
    assert torch.allclose(cross_entropy(logits, torch.eye(4).double()[hard]), expected, rtol=1e-12)
    assert bool(cross_entropy(logits * 1e4, targets).isfinite().all())


def test_bounds_map_between_pixels_and_inputs() -> None:
    bounds = Bounds.of((0.1, 0.5, 0.9), (0.2, 1.0, 3.0), torch.float64)
    pixels = uniform(KEY, (2, 3, 4, 4), torch.float64)
    inputs = bounds.from_pixels(pixels)
    assert torch.allclose(bounds.to_pixels(inputs), pixels, atol=1e-15)
    assert torch.allclose(inputs[:, 2], (pixels[:, 2] - 0.9) / 3.0, rtol=1e-14)


def test_the_box_is_where_pixels_are() -> None:
    bounds = Bounds.of((0.1, 0.5, 0.9), (0.2, 1.0, 3.0), torch.float64)
    inputs = 20 * normal(KEY, (2, 3, 4, 4), torch.float64)
    pixels = inputs * bounds.std + bounds.mean
    clamped = bounds.clamp(inputs) * bounds.std + bounds.mean
    assert torch.allclose(clamped, pixels.clamp(0, 1), atol=1e-14)
    assert torch.equal(bounds.clamp(bounds.clamp(inputs)), bounds.clamp(inputs))
    within = bounds.from_pixels(uniform(KEY, (3, 4, 4), torch.float64))
    assert torch.equal(bounds.clamp(within), within)
    assert float(bounds.to_pixels(inputs).min()) >= 0
    assert float(bounds.to_pixels(inputs).max()) <= 1


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0, 0.0), (1.0,)), ((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((0.0,), (float("nan"),))]
)
def test_bounds_need_positive_spreads_for_each_channel(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        Bounds.of(mean, std)
