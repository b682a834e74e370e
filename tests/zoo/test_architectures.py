"""The registered networks: sizes in closed form and from papers, forward passes by hand, and how they lift."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args

import pytest
import torch
from test_models import LARGE, NAMES, build, count
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from keyhole.core.keys import fold_in, new_key
from keyhole.core.registry import MODELS
from keyhole.core.task import Bounds, Task, plain_gradient, weights_of
from keyhole.core.types import Batch, Tensors, Weights
from keyhole.errors import ConfigError, ModelError, UnknownName
from keyhole.experiment.spec import parse_experiment
from keyhole.zoo.resnet import BasicBlock

torch.set_num_threads(1)

SHAPES = [(3, 32, 32), (1, 28, 28), (1, 9, 14)]
NARROW: dict[str, dict[str, Any]] = {
    "convnet": {"width": 2},
    "mcnn": {"width": 2},
    "mlp": {"hidden": 8},
    "resnet18": {"width": 4},
    "resnet20": {"width": 2},
    "resnet32": {"width": 2},
    "scnn": {"width": 2},
}
"""Options that make a network small, where it has them."""
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("lenet_zhu", {"activation": "relu", "init": "default"}),
    ("convnet", {"dropout_rate": 0.5}),
    ("mlp", {"dropout_rate": 0.5}),
]
BLOCKS = {"resnet20": (3, 3, 3), "resnet32": (5, 5, 5), "resnet18": (2, 2, 2, 2)}


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def head(model: nn.Module) -> nn.Linear:
    found = model.get_submodule("head")
    assert isinstance(found, nn.Linear)
    return found


def task_of(model: nn.Module, shape: tuple[int, ...], classes: int) -> Task:
    bounds = Bounds.of((0.0,) * shape[0], (1.0,) * shape[0])
    return Task.of(model, shape, classes, bounds, batchnorm="eval", dropout="off")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Every network


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in NAMES for shape in SHAPES if name not in LARGE or min(shape[1:]) >= LARGE[name][1]],
)
def test_every_model_makes_a_task(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 5, **NARROW.get(name, {}))
    assert model(torch.rand(2, *shape)).shape == (2, 5)
    assert task_of(model, shape, 5).head == "head"


def batches(trials: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """One image and one label a trial: (t, 1, *shape) and (t, 1, k)."""
    return uniform(trials, 1, *shape), torch.eye(classes, dtype=torch.float64)[:trials, None]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_matching_lifts_over_images_and_networks(name: str, options: dict[str, Any]) -> None:
    """What an attack needs: gradients of a gradient's distance, for several networks at once as one by one."""
    shape, classes, trials = LARGE.get(name, (1, 9, 9)), 4, 3
    models = [
        build(name, shape, classes, seed=seed, **NARROW.get(name, {}), **options).double() for seed in range(trials)
    ]
    task = task_of(models[0], shape, classes)
    each = [weights_of(model, torch.float64) for model in models]
    inputs, targets = batches(trials, shape, classes)
    key = torch.zeros(2, dtype=torch.int64)
    share = torch.ones(1, dtype=torch.float64)

    def slope(weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensors, Tensor]:
        def distance(guess: Tensor) -> tuple[Tensor, Tensors]:
            update = plain_gradient(task)(weights, Batch(guess, y, share), key)
            return sum((g**2).sum() for g in update.values()), update  # type: ignore[return-value]

        steepest, update = grad(distance, has_aux=True)(x)
        return update, steepest

    stacked = Weights(
        {n: torch.stack([w.params[n] for w in each]) for n in each[0].params},
        {n: torch.stack([w.buffers[n] for w in each]) for n in each[0].buffers},
    )
    updates, slopes = vmap(slope)(stacked, inputs, targets)
    for i, weights in enumerate(each):
        update, alone = slope(weights, inputs[i], targets[i])
        assert list(update) == names(models[0])
        for leaf, value in update.items():
            torch.testing.assert_close(updates[leaf][i], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slopes[i], alone, rtol=1e-9, atol=1e-12)
        assert alone.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_leave_their_inputs_alone(name: str) -> None:
    shape = LARGE.get(name, (1, 9, 9))
    model = build(name, shape, 4, **NARROW.get(name, {})).eval()
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    images = torch.rand(2, *shape, requires_grad=True)
    before, version = images.detach().clone(), images._version
    model(images).sum().backward()
    assert torch.equal(images.detach(), before) and images._version == version
    assert images.grad is not None and images.grad.abs().max() > 0


def test_cards() -> None:
    raw = {"lenet_zhu", "lenet_zhu4", "mcnn", "scnn"}
    assert {card.name for card in MODELS if not card.facts["normalize"]} == raw
    assert {"convnet", "mlp", "cnn6", *BLOCKS} <= set(NAMES)
    assert all(card.summary and card.link for card in MODELS)


@pytest.mark.parametrize(
    ("name", "shape", "options", "error", "said"),
    [
        ("convnet", (1, 8, 8), {}, ModelError, r"\(1, 8, 8\).*at least 9 pixels"),
        ("resnet20", (1, 3, 8), {}, ModelError, r"'resnet20'.*\(1, 3, 8\).*at least 4 pixels"),
        ("resnet32", (1, 8, 3), {}, ModelError, r"'resnet32'.*\(1, 8, 3\).*at least 4 pixels"),
        ("resnet18", (1, 7, 8), {}, ModelError, r"'resnet18'.*\(1, 7, 8\).*at least 8 pixels"),
        ("cnn6", (1, 7, 7), {}, ModelError, r"'cnn6'.*\(1, 7, 7\).*at least 8 pixels"),
        ("cnn6", (0, 8, 8), {}, ModelError, r"'cnn6'.*\(0, 8, 8\)"),
        ("mcnn", (1, 28, 28), {}, ModelError, r"'mcnn'.*\(1, 28, 28\).*at least 32 pixels. Set data.size"),
        ("scnn", (1, 32, 31), {}, ModelError, r"'scnn'.*\(1, 32, 31\).*at least 32 pixels"),
        ("mcnn", (1, 32, 32), {"width": 0}, ConfigError, "model.width is 0"),
        ("scnn", (1, 32, 32), {"width": 0}, ConfigError, "model.width is 0"),
        ("lenet_zhu", (12,), {}, ModelError, r"\(12,\).*channels, height, width"),
        ("lenet_zhu4", (12,), {}, ModelError, r"'lenet_zhu4'.*\(12,\).*channels, height, width"),
        ("convnet", (3, 32, 32), {"width": 0}, ConfigError, "model.width is 0"),
        ("resnet18", (3, 32, 32), {"width": 0}, ConfigError, "model.width is 0"),
        ("mlp", (3, 32, 32), {"hidden": 0}, ConfigError, "model.hidden is 0"),
        ("mlp", (3, 32, 32), {"layers": 0}, ConfigError, "model.layers is 0"),
        ("mlp", (3, 32, 32), {"dropout_rate": 1.0}, ConfigError, "model.dropout_rate is 1.0.*below 1"),
        ("convnet", (3, 32, 32), {"dropout_rate": -0.1}, ConfigError, "model.dropout_rate is -0.1.*at least 0"),
        ("lenet_zhu", (3, 32, 32), {"activation": "tanh"}, UnknownName, "activation 'tanh'.*relu, sigmoid"),
        ("lenet_zhu4", (3, 32, 32), {"init": "uniforn"}, UnknownName, "init 'uniforn'.*did you mean 'uniform'"),
    ],
)
def test_wrong_requests(name: str, shape: tuple[int, ...], options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build(name, shape, **options)


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet18", "cnn6", "convnet"])
def test_the_smallest_input(name: str) -> None:
    least = {"resnet20": 4, "resnet32": 4, "resnet18": 8, "cnn6": 8, "convnet": 9}[name]
    model = build(name, (1, least, least), 3, **NARROW.get(name, {})).eval()
    images = torch.rand(2, 1, least, least)
    assert not torch.equal(*model(images))


# LeNets


@pytest.mark.parametrize("name", ["lenet_zhu", "lenet_zhu4"])
@pytest.mark.parametrize(
    ("shape", "features"), [((3, 32, 32), 768), ((1, 28, 28), 588), ((1, 8, 8), 48), ((1, 25, 30), 672)]
)
def test_lenet_head(name: str, shape: tuple[int, ...], features: int) -> None:
    assert head(build(name, shape)).in_features == features


def test_lenet_zhu_gradient_entries() -> None:
    model = build("lenet_zhu", (3, 32, 32), 100)
    assert count(model) == (3 * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12 + (768 + 1) * 100 == 85_036
    task = task_of(model, (3, 32, 32), 100)
    targets = F.one_hot(torch.tensor([7]), 100).float()
    batch = Batch(torch.rand(1, 3, 32, 32), targets, torch.ones(1))
    update = plain_gradient(task)(weights_of(model), batch, torch.zeros(2, dtype=torch.int64))
    assert sum(g.numel() for g in update.values()) == 85_036
    layers = ("conv1", "conv2", "conv3", "head")
    assert list(update) == [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    assert count(build("lenet_zhu", (1, 28, 28), 10)) == 13_426


def test_lenet_zhu4_is_the_network_of_soteria() -> None:
    model = build("lenet_zhu4", (3, 32, 32), 10)
    assert count(model) == (3 * 25 + 1) * 12 + 3 * (12 * 25 + 1) * 12 + (768 + 1) * 10 == 19_438
    assert len(names(model)) == 10 and names(model)[8] == "head.weight"
    strides = [m.stride for m in model if isinstance(m, nn.Conv2d)]  # type: ignore[attr-defined]
    assert strides == [(2, 2), (2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [("lenet_zhu", {}, 100), ("lenet_zhu", {"activation": "relu"}, 100), ("lenet_zhu4", {}, 100)],
)
def test_uniform_lenets_draw_every_parameter_from_the_same_interval(name: str, options: Any, classes: int) -> None:
    for leaf, parameter in build(name, (3, 32, 32), classes, **options).named_parameters():
        assert parameter.abs().max() <= 0.5
        # n uniform draws leave more than 10/n of the interval free at an end with probability exp(-10).
        assert parameter.abs().max() > 0.5 - 10 / parameter.numel(), leaf
        assert parameter.detach().var(correction=0) > 1 / 12 / 3, leaf


@pytest.mark.parametrize("name", ["lenet_zhu", "lenet_zhu4"])
def test_default_initialisation_is_pytorchs(name: str) -> None:
    """Uniform on +-1/sqrt(fan in), weights and biases."""
    model = build(name, (3, 32, 32), 100, init="default")
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > bound * (1 - 20 / parameter.numel())


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize(("name", "strides"), [("lenet_zhu", (2, 2, 1)), ("lenet_zhu4", (2, 2, 1, 1))])
def test_lenet_forward(name: str, strides: tuple[int, ...], activation: str) -> None:
    model = build(name, (1, 9, 9), 4, activation=activation).double()
    p = dict(model.named_parameters())
    numbers = range(1, len(strides) + 1)
    children = [name for i in numbers for name in (f"conv{i}", f"{activation}{i}")]
    assert [name for name, _ in model.named_children()] == [*children, "flatten", "head"]
    images = x = uniform(2, 1, 9, 9)
    for i, stride in zip(numbers, strides, strict=True):
        x = F.conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], stride, 2)
        x = torch.sigmoid(x) if activation == "sigmoid" else x.clamp(min=0)
    torch.testing.assert_close(model(images), x.flatten(1) @ p["head.weight"].T + p["head.bias"])


def test_a_seed_draws_as_it_always_has() -> None:
    """Layer by layer as PyTorch does, and then, for a LeNet, every parameter again: old audits keep their networks."""
    high, low = fold_in(new_key(5), "model").tolist()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((high << 32) | low)
        convs = [nn.Conv2d(1, 12, 5), nn.Conv2d(12, 12, 5), nn.Conv2d(12, 12, 5)]
        lenet = [leaf for layer in (*convs, nn.Linear(48, 3)) for leaf in layer.parameters()]
        for leaf in lenet:
            nn.init.uniform_(leaf, -0.5, 0.5)
        torch.default_generator.manual_seed((high << 32) | low)
        mlp = [leaf for layer in (nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 3)) for leaf in layer.parameters()]
    for expected, model in (
        (lenet, build("lenet_zhu", (1, 8, 8), 3, seed=5)),
        (mlp, build("mlp", (1, 8, 8), 3, seed=5, hidden=6, layers=2)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_activation_does_not_change_the_draw() -> None:
    plain, relu = (build("lenet_zhu", activation=a).state_dict() for a in ("sigmoid", "relu"))
    assert all(torch.equal(plain[key], relu[key]) for key in plain)


# The convolutional network and the multi-layer perceptron


@pytest.mark.parametrize(("width", "published"), [(4, None), (32, 733_642), (64, 2_904_970)])
def test_convnet_size(width: int, published: int | None) -> None:
    model = build("convnet", width=width, classes=10)
    assert head(model).in_features == 36 * width
    convs = [m for m in model if isinstance(m, nn.Conv2d)]  # type: ignore[attr-defined]
    assert [conv.out_channels // width for conv in convs] == [1, 2, 2, 4, 4, 4, 4, 4]
    w = width
    inner = w * 2 * w + 2 * w * 2 * w + 2 * w * 4 * w + 4 * (4 * w * 4 * w)
    outputs = 25 * w
    assert count(model) == 9 * (3 * w + inner) + outputs + 2 * outputs + (36 * w + 1) * 10
    assert published in (None, count(model))
    assert len(names(model)) == 34 and names(model)[32] == "head.weight"
    assert "norm8.running_mean" in model.state_dict()


def test_convnet_of_other_sizes() -> None:
    assert head(build("convnet", (1, 28, 28), width=2)).in_features == 8 * 9
    assert head(build("convnet", (1, 64, 9), width=2)).in_features == 8 * 7


@pytest.mark.parametrize(("hidden", "layers"), [(1024, 3), (16, 1), (8, 5)])
def test_mlp_size(hidden: int, layers: int) -> None:
    model = build("mlp", (3, 32, 32), 10, hidden=hidden, layers=layers)
    assert count(model) == (3072 + 1) * hidden + (layers - 1) * (hidden + 1) * hidden + (hidden + 1) * 10


def test_mlp_defaults_are_the_papers() -> None:
    assert count(build("mlp")) == 3073 * 1024 + 2 * 1025 * 1024 + 1025 * 10


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_dropout_stands_before_the_head_and_only_where_it_is_asked_for(name: str) -> None:
    plain = build(name, (1, 12, 12), **NARROW[name])
    dropped = build(name, (1, 12, 12), dropout_rate=0.25, **NARROW[name])
    assert not any(isinstance(m, nn.Dropout) for m in plain.modules())
    assert [n for n, _ in dropped.named_children()][-2:] == ["dropout", "head"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dropped.parameters(), strict=True))
    assert list(plain.state_dict()) == list(dropped.state_dict())
    images = torch.rand(3, 1, 12, 12)
    assert torch.equal(plain.eval()(images), dropped.eval()(images))
    assert isinstance(dropped.dropout, nn.Dropout) and dropped.dropout.p == 0.25
    with pytest.raises(ModelError, match=r"dropout \('dropout'\)"):
        Task.of(dropped, (1, 12, 12), 10, Bounds.of((0.0,), (1.0,)), batchnorm="eval")


# Residual networks


def resnet_count(blocks: tuple[int, ...], width: int, channels: int, classes: int) -> tuple[int, int]:
    """Parameters without those of the shortcuts, and those of the shortcuts."""
    body, shortcuts, before = 9 * channels * width + 2 * width, 0, width
    for stage, number in enumerate(blocks):
        after = 2**stage * width
        body += 9 * before * after + (2 * number - 1) * 9 * after**2 + number * 4 * after
        shortcuts += (before * after + 2 * after) * (before != after)
        before = after
    return body + (before + 1) * classes, shortcuts


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [("resnet20", {}, 16), ("resnet32", {}, 16), ("resnet18", {}, 64), ("resnet20", {"width": 48}, 48)],
)
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 7)])
def test_resnet_size(name: str, options: dict[str, int], width: int, channels: int, classes: int) -> None:
    model = build(name, (channels, 28, 28), classes, **options)
    assert count(model) == sum(resnet_count(BLOCKS[name], width, channels, classes))
    assert head(model).in_features == width * 2 ** (len(BLOCKS[name]) - 1)


def test_resnet_sizes_that_were_published() -> None:
    """He et al. 2016, table 6: 0.27 and 0.46 million, for shortcuts without parameters."""
    for name, millions in (("resnet20", 0.27), ("resnet32", 0.46)):
        _, shortcuts = resnet_count(BLOCKS[name], 16, 3, 10)
        assert shortcuts == 16 * 32 + 64 + 32 * 64 + 128 == 2_752
        assert round((count(build(name)) - shortcuts) / 1e6, 2) == millions
    # ResNet-18 for 200 classes has 11,279,112, of which its first layer, 7x7 instead of 3x3, is 9,408.
    assert count(build("resnet18", (3, 32, 32), 200)) == 11_279_112 - 3 * (49 - 9) * 64
    layers = 1 + 2 * sum(BLOCKS["resnet18"]) + 1
    assert layers == 18 and names(build("resnet18", width=4))[60] == "head.weight"


@pytest.mark.parametrize(("name", "sides"), [("resnet20", (32, 16, 8)), ("resnet18", (32, 16, 8, 4))])
def test_resnet_stages_halve_the_sides(name: str, sides: tuple[int, ...]) -> None:
    model = build(name, (1, 32, 32), 4, **NARROW[name]).eval()
    trace = task_of(model, (1, 32, 32), 4).trace(weights_of(model), torch.rand(1, 1, 32, 32))
    width = NARROW[name]["width"]
    assert trace.activations["relu"].shape == (1, width, 32, 32)
    for stage, side in enumerate(sides, start=1):
        ends = trace.activations[f"stage{stage}.block{BLOCKS[name][stage - 1]}.relu2"]
        assert ends.shape == (1, width * 2 ** (stage - 1), side, side)
    torch.testing.assert_close(trace.features, ends.mean((2, 3)))


@pytest.mark.parametrize(("outputs", "stride"), [(3, 1), (5, 1), (3, 2), (6, 2)])
def test_basic_block_forward(outputs: int, stride: int) -> None:
    block = BasicBlock(3, outputs, stride).double().eval()
    for number, tensor in enumerate([*block.parameters(), *block.buffers()]):
        if tensor.is_floating_point():
            tensor.data = 0.1 + uniform(*tensor.shape, seed=number)
            if tensor.dim() == 4:
                tensor.data -= 0.6
    s = block.state_dict()

    def norm(x: Tensor, layer: str) -> Tensor:
        mean, var, weight, bias = (
            s[f"{layer}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return weight * (x - mean) / (var + 1e-5).sqrt() + bias

    x = uniform(2, 3, 7, 6, seed=99)
    inner = norm(F.conv2d(x, s["conv1.weight"], None, stride, 1), "norm1").clamp(min=0)
    beside = norm(F.conv2d(inner, s["conv2.weight"], None, 1, 1), "norm2")
    straight = outputs == 3 and stride == 1
    short = x if straight else norm(F.conv2d(x, s["shortcut.conv.weight"], None, stride), "shortcut.norm")
    assert ("shortcut.conv.weight" in s) != straight
    expected = (beside + short).clamp(min=0)
    assert 0 < (expected == 0).double().mean() < 1
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "width"), [("resnet20", 16), ("resnet18", 8)])
def test_resnet_initialisation(name: str, width: int) -> None:
    """Normal of variance 2 / (outputs * kernel area) for convolutions, scale 1 and shift 0 for BatchNorm."""
    model = build(name, width=width)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            weight = module.weight.detach()
            n, std = weight.numel(), math.sqrt(2 / weight[:, 0].numel())
            assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(n)
            assert float(weight.abs().max()) > 2 * std  # which no uniform of this variance reaches
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


# The network of R-GAP


def test_cnn6_size() -> None:
    model = build("cnn6", (3, 32, 32), 10)
    convs = 16 * 3 * 12 + 9 * (12 * 36 + 2 * 36 * 36 + 36 * 64 + 64 * 128)
    assert count(model) == convs + 3201 * 10
    assert [leaf for leaf in names(model) if leaf.endswith("bias")] == ["head.bias"]


@pytest.mark.parametrize(
    ("shape", "features"),
    [((3, 32, 32), 3200), ((1, 28, 28), 128 * 4 * 4), ((1, 8, 15), 128 * 2 * 2), ((3, 64, 33), 128 * 9 * 5)],
)
def test_cnn6_head(shape: tuple[int, ...], features: int) -> None:
    model = build("cnn6", shape)
    assert head(model).in_features == features
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    _, height, width = shape
    assert features == 128 * math.ceil((height // 2 + 1) / 4) * math.ceil((width // 2 + 1) / 4)


def test_cnn6_forward() -> None:
    model = build("cnn6", (3, 10, 13), 4).double()
    p = dict(model.named_parameters())
    images = x = uniform(2, 3, 10, 13)
    for number, (stride, padding) in enumerate([(2, 2), (2, 1), (1, 1), (1, 1), (2, 1), (1, 1)], start=1):
        x = F.conv2d(x, p[f"conv{number}.weight"], None, stride, padding)
        assert (x < 0).any()
        x = torch.maximum(x, 0.2 * x)
    torch.testing.assert_close(model(images), x.flatten(1) @ p["head.weight"].T + p["head.bias"])


# Target and evaluator of model inversion


@pytest.mark.parametrize(
    ("name", "channels", "classes", "width", "parameters"),
    [
        ("mcnn", 1, 5, 64, 1_029_765),
        ("mcnn", 1, 5, 32, 258_885),
        ("mcnn", 3, 5, 64, 1_029_765 + 2 * 49 * 64),
        ("scnn", 1, 10, 32, 1_740_234),
        ("scnn", 3, 10, 32, 1_740_234 + 2 * 49 * 32),
    ],
)
def test_networks_of_model_inversion_size(name: str, channels: int, classes: int, width: int, parameters: int) -> None:
    model = build(name, (channels, 32, 32), classes, width=width)
    assert count(model) == parameters
    assert head(model).in_features == {"mcnn": 4, "scnn": 16}[name] * width


@pytest.mark.parametrize(("name", "features"), [("mcnn", 8), ("scnn", 32)])
def test_networks_of_model_inversion_on_larger_images(name: str, features: int) -> None:
    """36 pixels leave 2 where 32 leave 1: 36, 32, 16, 12, 6, 2."""
    assert head(build(name, (1, 36, 32), width=2)).in_features == 2 * features
    assert head(build(name, (1, 35, 35), width=2)).in_features == features


@pytest.mark.parametrize("name", ["mcnn", "scnn"])
def test_networks_of_model_inversion_forward(name: str) -> None:
    model = build(name, (3, 32, 32), 4, width=2).double()
    for number, tensor in enumerate(t for t in model.state_dict().values() if t.is_floating_point()):
        tensor.copy_(0.1 + uniform(*tensor.shape, seed=number) - 0.5 * (tensor.dim() == 4))
    s = model.eval().state_dict()
    images = x = uniform(2, 3, 32, 32)
    for number, padding in enumerate({"mcnn": (1, 0, 0), "scnn": (1, 0, 0, 1, 1)}[name], start=1):
        x = F.conv2d(x, s[f"conv{number}.weight"], s[f"conv{number}.bias"], padding=padding)
        mean, var, scale, shift = (
            s[f"norm{number}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        x = scale * (x - mean) / (var + 1e-5).sqrt() + shift
        x = torch.maximum(x, 0.2 * x)
        if number < 3:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    torch.testing.assert_close(model(images), x.flatten(1) @ s["head.weight"].T + s["head.bias"])


# Options in an audit file


def audit(**model: Any) -> Any:
    return parse_experiment({"data": {"name": "digits"}, "model": model, "attacks": [{"name": "idlg"}]})


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_options_reach_the_network_from_an_audit_file(name: str, options: dict[str, Any]) -> None:
    options = {**NARROW.get(name, {}), **options}
    section = audit(name=name, batchnorm="eval", dropout="off", **options).model
    assert section.options == options
    build(name, LARGE.get(name, (1, 9, 9)), **section.options)


def test_every_choice_of_an_audit_file_can_be_built() -> None:
    tried = 0
    for card in MODELS:
        for option, parameter in card.signature().parameters.items():
            if parameter.default is inspect.Parameter.empty:
                continue
            for choice in get_args(parameter.annotation):
                section = audit(name=card.name, **{option: choice}).model
                build(card.name, (1, 9, 9), **section.options)
                tried += 1
    assert tried >= 8


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "lenet_zhu", "activation": "tanh"}, "activation: input should be 'sigmoid' or 'relu'"),
        ({"name": "lenet_zhu4", "init": "kaiming"}, "init: input should be 'uniform' or 'default'"),
        ({"name": "resnet18", "width": 2.5}, "width: input should be a valid integer"),
        ({"name": "mlp", "dropout_rate": "half"}, "dropout_rate: input should be a valid number"),
        ({"name": "cnn6", "width": 4}, "unknown key 'width'"),
        ({"name": "resnet22"}, "unknown model 'resnet22'.*did you mean 'resnet"),
    ],
)
def test_options_that_an_audit_file_must_not_have(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        audit(**model)
