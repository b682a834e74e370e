"""Label rules: closed forms, measured overlaps, and the promises that every rule of the registry keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from keyhole.core.keys import bernoulli, fold_in, integers, new_key, normal, split, uniform
from keyhole.core.registry import LABELS
from keyhole.core.task import Bounds, Task, plain_gradient, weights_of
from keyhole.core.types import Batch, Key, Observation, Tensors, Weights
from keyhole.errors import Refused
from keyhole.parts import labels

DOUBLE = torch.float64
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}
NAMES = [card.name for card in LABELS]


def mlp(activation: str = "sigmoid", *, bias: bool = True, classes: int = 10) -> Task:
    """36 pixels, 24 hidden units; the head is not the last parameter, so position would not find it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, classes, bias=bias)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), ACTIVATIONS[activation]())

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.body(inputs))

    return Task.of(Net().double(), (1, 6, 6), classes, Bounds.of((0.4,), (0.3,), DOUBLE))


def lenet(classes: int = 10, *, bias: bool = True) -> Task:
    """The sigmoid network of DLG, for gray images of 32 x 32 pixels."""
    layers: list[nn.Module] = []
    for channels, stride in ((1, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, padding=2, stride=stride), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, classes, bias=bias))
    return Task.of(model.double(), (1, 32, 32), classes, Bounds.of((0.0,), (1.0,), DOUBLE))


def draw_weights(task: Task, key: Key, width: float = 0.5) -> Weights:
    """Every parameter uniform in (-width, width)."""
    shapes = {name: tuple(p.shape) for name, p in weights_of(task.model).params.items()}
    params = {name: width * (2 * uniform(fold_in(key, name), shape, DOUBLE) - 1) for name, shape in shapes.items()}
    return Weights(params, {})


def one_hot(classes: Tensor, count: int) -> Tensor:
    """Class numbers (b,) as rows (b, count)."""
    return (classes[:, None] == torch.arange(count)).to(DOUBLE)


def update_of(task: Task, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensors:
    """The gradient of the mean loss."""
    size = inputs.shape[0]
    share = torch.full((size,), 1.0 / size, dtype=DOUBLE)
    return plain_gradient(task)(weights, Batch(inputs, targets, share), new_key(0))


def noise_batch(task: Task, size: int, key: Key) -> tuple[Tensor, Tensor]:
    """Uniform images and uniform labels."""
    pixels = uniform(fold_in(key, "pixels"), (size, *task.input_shape), DOUBLE)
    drawn = integers(fold_in(key, "labels"), task.num_classes, (size,))
    return task.bounds.from_pixels(pixels), one_hot(drawn, task.num_classes)


def rule(name: str) -> Callable[..., Tensor]:
    """The registered rule itself."""
    return LABELS.card(name).factory


def counts_of(rows: Tensor) -> Tensor:
    """How many rows each class has."""
    return rows.sum(0)


def idlg_hits(task: Task, seed: int, keep: float = 1.0, count: int = 1000) -> tuple[Tensor, Tensor]:
    """Over ``count`` random networks and images: hits, and whether any feature is not zero, (count,)."""

    def trial(key: Key) -> tuple[Tensor, Tensor]:
        weights = draw_weights(task, key)
        inputs, targets = noise_batch(task, 1, key)
        update = update_of(task, weights, inputs, targets)
        update = {name: g * bernoulli(fold_in(key, f"mask {name}"), keep, tuple(g.shape)) for name, g in update.items()}
        got = rule("idlg")(task, 1, Observation(update=update), key)
        return (got == targets).all(), task.trace(weights, inputs).features.abs().sum() > 0

    return vmap(trial)(split(new_key(seed), count))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_gradient_sums_to_zero(activation: str) -> None:
    """The identity that all rules stand on."""
    task = mlp(activation)
    inputs, targets = noise_batch(task, 5, new_key(1))
    update = update_of(task, draw_weights(task, new_key(2)), inputs, targets)
    assert update["head.bias"].abs().max() > 1e-3
    assert abs(update["head.bias"].sum().item()) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_idlg_is_always_right_for_one_image(activation: str, bias: bool) -> None:
    """1000 networks, with and without the bias rule."""
    hits, alive = idlg_hits(mlp(activation, bias=bias), seed=3)
    assert alive.sum() > 900
    assert hits[alive].all()


@pytest.mark.parametrize("classes", [2, 3])
def test_idlg_with_few_classes(classes: int) -> None:
    """Two classes without a bias have opposite rows; the row sum decides where features are positive."""
    hits, alive = idlg_hits(mlp("sigmoid", bias=False, classes=classes), seed=4)
    assert hits[alive].all()
    hits, alive = idlg_hits(mlp("tanh", bias=True, classes=classes), seed=4)
    assert hits[alive].all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_idlg_survives_masking_half_of_the_gradient(activation: str, bias: bool) -> None:
    """Half of the true entries of the bias gradient are gone; the rows of the weight gradient still tell."""
    hits, alive = idlg_hits(mlp(activation, bias=bias), seed=5, keep=0.5)
    assert hits[alive].double().mean() >= 0.95


def test_true_row_is_exact_under_any_mask_that_leaves_a_shared_entry() -> None:
    """The proof in the docstring, where the norm rule fails: a model that is sure of one wrong class."""

    def trial(key: Key) -> tuple[Tensor, Tensor]:
        features = normal(fold_in(key, "h"), (200,), DOUBLE)
        logits = 20 * uniform(fold_in(key, "z"), (4,), DOUBLE)
        label = integers(fold_in(key, "y"), 4, ())
        rows = (torch.softmax(logits, 0) - (torch.arange(4) == label).double())[:, None] * features
        rows = rows * bernoulli(fold_in(key, "m"), 0.5, (4, 200))
        return labels.true_row(rows) == label, rows.square().sum(-1).argmax() == label

    ours, norm = vmap(trial)(split(new_key(6), 1000))
    assert ours.all()
    assert norm.double().mean() < 0.95


def test_idlg_tiny_probabilities_do_not_underflow() -> None:
    """Squares of 1e-30 are zero in float32; the rows of improbable classes must count all the same."""
    features = torch.tensor([1.0, -2.0, 0.5])
    rows = torch.tensor([1e-30, 1.0, -1.0, 1e-32])[:, None] * features
    assert labels.true_row(rows) == 2


def test_true_row_excludes_classes_whose_bias_gradient_is_positive() -> None:
    """Two opposite rows, the row sum wrong because the features are negative, the true bias entry masked."""
    rows = torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).mT @ torch.tensor([[-1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    assert labels.true_row(rows) == 0
    assert labels.true_row(rows, torch.tensor([0.3, 0.0])) == 1


def test_idlg_reads_the_bias_first() -> None:
    """A defense may silence the whole weight gradient; one negative entry of the bias is enough."""
    seen = Observation(update={"head.weight": torch.zeros(4, 24), "head.bias": torch.tensor([0, 0.2, -0.5, 0.3])})
    assert rule("idlg")(mlp(classes=4), 1, seen, new_key(0)).argmax() == 2


@pytest.mark.parametrize("size", [1, 8, 32])
def test_geng_with_the_true_mean_prediction_is_exact(size: int) -> None:
    """Before any rounding."""
    task = mlp("tanh")
    weights = draw_weights(task, new_key(7))
    inputs, targets = noise_batch(task, size, new_key(8))
    update = update_of(task, weights, inputs, targets)
    mean = torch.softmax(task.logits(weights, inputs), -1).mean(0)
    counts = labels.geng_counts(mean, update["head.bias"], size)
    torch.testing.assert_close(counts, counts_of(targets), atol=1e-9, rtol=0)


def test_geng_without_bias_is_exact_for_one_repeated_image() -> None:
    """Then all images have the same sum of features."""
    task = mlp("sigmoid", bias=False)
    weights = draw_weights(task, new_key(9))
    inputs, targets = noise_batch(task, 8, new_key(10))
    inputs = inputs[:1].expand(8, -1, -1, -1)
    update = update_of(task, weights, inputs, targets)
    trace = task.trace(weights, inputs)
    counts = labels.geng_counts_without_bias(
        torch.softmax(trace.logits, -1).mean(0), update["head.weight"].sum(-1), trace.features[0].sum(), 8
    )
    torch.testing.assert_close(counts, counts_of(targets), atol=1e-9, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_ilrg_is_exact_when_all_features_agree(activation: str) -> None:
    """One image repeated under different labels: the closed form holds before any rounding."""
    task = mlp(activation)
    for number in range(20):
        weights = draw_weights(task, new_key(100 + number))
        inputs, targets = noise_batch(task, 12, new_key(200 + number))
        inputs = inputs[:1].expand(12, -1, -1, -1)
        update = update_of(task, weights, inputs, targets)
        own = weights.params
        counts = labels.ilrg_counts(
            own["head.weight"], own["head.bias"], update["head.weight"], update["head.bias"], 12
        )
        torch.testing.assert_close(counts, counts_of(targets), atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_ilrg_counts_images_that_are_alike(activation: str) -> None:
    """Ten variants of an image, one for each class: the rows mix their features, the rounding repairs it."""
    task = mlp(activation)
    for number in range(20):
        weights = draw_weights(task, new_key(300 + number))
        images, _ = noise_batch(task, 10, new_key(400 + number))
        images = images[:1] + 0.01 * (images - images[:1])
        drawn = integers(new_key(500 + number), 10, (12,))
        targets = one_hot(drawn, 10)
        update = update_of(task, weights, images[drawn], targets)
        got = rule("ilrg")(task, 12, Observation(weights, update), new_key(0))
        assert torch.equal(counts_of(got), counts_of(targets))


def test_bias_corrected_by_hand() -> None:
    """Present classes first, then the lowest entry, and each label given raises its entry by the impact."""
    # Impact -0.275: classes 0 and 1 once, which leaves -0.325 and -0.225, so once more each.
    assert labels.bias_corrected_counts(torch.tensor([-0.6, -0.5, 1.1]), 4).tolist() == [2.0, 2.0, 0.0]
    # Impact -0.303: class 1 is present although class 0 stays lower after both of its labels.
    assert labels.bias_corrected_counts(torch.tensor([-0.9, -0.01, 0.91]), 3).tolist() == [2.0, 1.0, 0.0]
    # More negative entries than images: the most negative ones are taken.
    assert labels.bias_corrected_counts(torch.tensor([-0.1, -0.5, 0.9, -0.3]), 2).tolist() == [
        0.0,
        1.0,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [
        ([2.0, 1.0, 0.0], 3, [2, 1, 0]),
        ([1.6, 0.9, 0.5], 3, [2, 1, 0]),
        ([0.4, -3.0, 1.3, 1.2], 3, [1, 0, 1, 1]),
        ([5.0, 3.0, 0.0], 4, [3, 1, 0]),
        ([8.0, 6.0, 0.0], 4, [3, 1, 0]),
        ([0.0, -3.0], 3, [2, 1]),
        ([1e30, 0.0], 3, [3, 0]),
        ([float("nan"), float("inf"), float("-inf")], 2, [0, 2, 0]),
    ],
)
def test_apportion(given: list[float], total: int, expected: list[int]) -> None:
    """Exact counts stay, remainders go to the largest fractions, and the sum is always right."""
    assert labels.apportion(torch.tensor(given), total).tolist() == expected


def test_apportion_is_floor_and_largest_remainders() -> None:
    """Against the rule as it is usually written, on counts that sum to the total."""
    for number in range(50):
        raw = uniform(new_key(number), (7,), DOUBLE)
        counts = 11 * raw / raw.sum()
        expected = counts.floor()
        short = int(11 - expected.sum())
        expected[(counts - counts.floor()).argsort(descending=True)[:short]] += 1
        assert labels.apportion(counts, 11).tolist() == expected.tolist()


def test_sorted_labels() -> None:
    """Counts to rows in ascending order."""
    rows = labels.sorted_labels(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3, torch.float32)
    assert rows.argmax(-1).tolist() == [1, 1, 3]
    assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("left", "right", "overlap"),
    [([0, 1, 2, 2], [2, 2, 1, 0], 1.0), ([0, 0, 0, 0], [1, 2, 1, 2], 0.0), ([0, 0, 1, 3], [0, 1, 1, 2], 0.5)],
)
def test_multiset_overlap(left: list[int], right: list[int], overlap: float) -> None:
    """By hand; the order does not count, how often a class occurs does."""
    rows, truth = one_hot(torch.tensor(left), 4), one_hot(torch.tensor(right), 4)
    assert labels.multiset_overlap(rows, truth).item() == overlap
    assert vmap(labels.multiset_overlap)(rows[None], truth[None]).tolist() == [overlap]


@pytest.fixture(scope="module")
def faces() -> Tensor:
    """100 gray faces (100, 1, 32, 32) with pixels in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    pixels = torch.tensor(data.lfw_subset()[:100], dtype=DOUBLE)[:, None]
    return nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)


def overlaps(task: Task, name: str, images: Tensor, size: int, batches: int = 20) -> Tensor:
    """Overlap of recovered and true labels (batches,), each batch with its own network, on natural images."""

    def trial(key: Key) -> Tensor:
        weights = draw_weights(task, fold_in(key, "net"))
        rows = uniform(fold_in(key, "rows"), (len(images),), DOUBLE).argsort()[:size]
        targets = one_hot(integers(fold_in(key, "classes"), task.num_classes, (size,)), task.num_classes)
        update = update_of(task, weights, images[rows], targets)
        return labels.multiset_overlap(rule(name)(task, size, Observation(weights, update), key), targets)

    return vmap(trial)(split(new_key(11), batches))


@pytest.mark.parametrize(("name", "least"), [("ilrg", 0.9), ("geng", 0.9), ("bias_corrected", 0.7)])
def test_overlap_on_the_sigmoid_lenet(faces: Tensor, name: str, least: float) -> None:
    """10 classes, 8 faces, parameters uniform in (-0.5, 0.5): the first row of the specification's table."""
    assert overlaps(lenet(), name, faces, 8).mean() >= least


def test_geng_without_bias_beats_chance(faces: Tensor) -> None:
    """The weight form, on the same network without the head's bias."""
    assert overlaps(lenet(bias=False), "geng", faces, 8).mean() >= 0.8


def test_random_is_near_its_expectation() -> None:
    """Two uniform labellings of 8 images in 10 classes overlap as two independent draws do."""
    task = mlp()

    def trial(key: Key) -> Tensor:
        truth = one_hot(integers(fold_in(key, "truth"), 10, (8,)), 10)
        return labels.multiset_overlap(rule("random")(task, 8, Observation(targets=truth), key), truth)

    measured = vmap(trial)(split(new_key(12), 4000))
    # E min(r, t) summed over classes, for r and t independent and binomial(8, 1/10), over 8 images.
    binomial = torch.distributions.Binomial(8, torch.tensor(0.1, dtype=DOUBLE))
    tail = torch.stack([binomial.log_prob(torch.arange(n, 9).double()).exp().sum() for n in range(1, 9)])
    expected = 10 * tail.square().sum() / 8
    assert abs(measured.mean().item() - expected.item()) < 0.01
    assert len(measured.unique()) > 4


def size_for(name: str) -> int:
    """A batch size that the rule accepts."""
    return 1 if name == "idlg" else 6


def observation_for(task: Task, size: int, key: Key) -> Observation:
    """An observation with every field that a rule may need."""
    weights = draw_weights(task, key)
    inputs, targets = noise_batch(task, size, key)
    order = targets.argmax(-1).argsort(stable=True)
    return Observation(weights, update_of(task, weights, inputs, targets), targets[order])


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in NAMES for size in (1, 6) if (name, size) != ("idlg", 6)]
)
def test_lifted_equals_looped(name: str, size: int) -> None:
    """Over 5 trials, each with its own network, batch and key."""
    task, keys = mlp("relu"), split(new_key(13), 5)

    def trial(key: Key) -> Tensor:
        return rule(name)(task, size, observation_for(task, size, key), key)

    looped = torch.stack([trial(key) for key in keys])
    torch.testing.assert_close(vmap(trial)(keys), looped, atol=1e-10, rtol=0)
    assert len({str(rows.tolist()) for rows in looped}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_one_hot_sorted_and_of_the_updates_dtype(name: str, dtype: torch.dtype) -> None:
    """Shape (b, k), one 1 a row, classes ascending, and the same again from the same key."""
    task, size = mlp("tanh"), size_for(name)
    full = observation_for(task, size, new_key(14))
    assert full.weights is not None and full.update is not None
    weights = Weights({n: p.to(dtype) for n, p in full.weights.params.items()}, {})
    seen = Observation(weights, {n: g.to(dtype) for n, g in full.update.items()}, full.targets)
    rows = rule(name)(task, size, seen, new_key(15))
    assert rows.shape == (size, 10) and rows.dtype == dtype
    assert ((rows == 0) | (rows == 1)).all()
    assert (rows.sum(-1) == 1).all()
    assert (rows.argmax(-1).diff() >= 0).all()
    assert torch.equal(rows, rule(name)(task, size, seen, new_key(15)))


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e308, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_update_does_not_raise(name: str, damage: float) -> None:
    """Any labels will do, as long as they are labels."""
    task, size = mlp(), size_for(name)
    full = observation_for(task, size, new_key(16))
    assert full.update is not None
    broken = full._replace(update={n: torch.full_like(g, damage) for n, g in full.update.items()})
    rows = rule(name)(task, size, broken, new_key(17))
    assert (rows.sum(-1) == 1).all()
    partly = {n: torch.where(torch.rand_like(g) < 0.1, damage, g) for n, g in full.update.items()}
    assert (rule(name)(task, size, full._replace(update=partly), new_key(17)).sum(-1) == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_rule_does_not_see_it_refuses(name: str) -> None:
    """Every field on the card is really needed, and nothing else is."""
    task, size = mlp(), 1 if name == "idlg" else 6
    full = observation_for(task, size, new_key(18))
    needs = LABELS.card(name).facts["needs"]
    for field in ("weights", "update", "targets"):
        hidden = full._replace(**{field: None})
        if field in needs:
            with pytest.raises(Refused, match=f"needs the {field}"):
                rule(name)(task, size, hidden, new_key(19))
        else:
            assert rule(name)(task, size, hidden, new_key(19)).shape == (size, 10)


def test_refusals_say_what_to_use_instead() -> None:
    """Sentences for the report."""
    task = mlp(bias=False)
    seen = observation_for(task, 6, new_key(20))
    with pytest.raises(Refused, match="one image's label and the batch has 6; use 'ilrg'"):
        rule("idlg")(task, 6, seen, new_key(0))
    for name in ("ilrg", "bias_corrected"):
        with pytest.raises(Refused, match=f"'{name}' needs a bias .* use 'geng'"):
            rule(name)(task, 6, seen, new_key(0))
    stripped = {n: g for n, g in (seen.update or {}).items() if n != "head.weight"}
    with pytest.raises(Refused, match=r"needs 'head\.weight'"):
        rule("geng")(task, 6, seen._replace(update=stripped), new_key(0))


@pytest.mark.parametrize(("size", "bias", "chosen"), [(1, True, "idlg"), (6, True, "ilrg"), (6, False, "geng")])
def test_auto_chooses(size: int, bias: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, several with a bias, several without."""
    task = mlp(bias=bias)
    seen = observation_for(task, size, new_key(21))
    asked: list[str] = []

    def spy(name: str) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            asked.append(name)
            return rule(name)(*arguments)

        return call

    for name in ("idlg", "ilrg", "geng"):
        monkeypatch.setattr(labels, name, spy(name))
    rule("auto")(task, size, seen, new_key(0))
    assert asked == [chosen]


def test_given_keeps_soft_labels() -> None:
    """What the threat model gives is passed on."""
    soft = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=DOUBLE)
    got = rule("given")(mlp(classes=2), 2, Observation(targets=soft), new_key(0))
    assert torch.equal(got, soft)


def test_a_bare_linear_model_is_its_own_head() -> None:
    """Its parameters have no prefix."""
    task = Task.of(nn.Sequential(nn.Linear(5, 4).double()), (5,), 4, Bounds.of((0.0,), (1.0,), DOUBLE))
    bare = Task.of(nn.Linear(5, 4).double(), (5,), 4, Bounds.of((0.0,), (1.0,), DOUBLE))
    assert (task.head, bare.head) == ("0", "")
    inputs, targets = uniform(new_key(22), (1, 5), DOUBLE), one_hot(torch.tensor([2]), 4)
    for each in (task, bare):
        update = update_of(each, draw_weights(each, new_key(23)), inputs, targets)
        assert torch.equal(rule("idlg")(each, 1, Observation(update=update), new_key(0)), targets)
