"""Obscuring: images far from the originals with their features, and attackers who go by the features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import keyhole.attacks  # noqa: F401  (fills the registry)
from keyhole.core.defense import Context, Counter, chain
from keyhole.core.keys import fold_in, new_key, split
from keyhole.core.registry import ATTACKS
from keyhole.core.task import plain_gradient
from keyhole.core.tensors import flatten
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Seen, Tensors
from keyhole.defenses.obscuring import HeadAlone, InvertFeatures, Obscuring
from keyhole.metrics.image import structural_similarity as scored_similarity
from keyhole.parts import similarity
from keyhole.parts.features import blank_features, feature_distance
from keyhole.parts.penalties import smooth_total_variation
from keyhole.solve.drive import solve
from keyhole.solve.feature_inversion import FeatureInversion
from keyhole.solve.lift import Shared

KEY = new_key(29)


def context(bench: Any, state: dict[str, Tensors] | None = None, **others: Any) -> Context:
    return Context(bench.task, bench.weights, others.pop("key", KEY), state={} if state is None else state, **others)


def public(bench: Any) -> Batch:
    """Eight public images, two of each class."""
    return bench.batch(8, seed=500)


def pixels(bench: Any, batch: Batch) -> Tensor:
    return bench.task.bounds.to_pixels(batch.inputs)


@pytest.mark.parametrize("start", ["public", "noise"])
@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_images_are_distinct_and_share_their_features(start: str, which: str, request: Any) -> None:
    bench = request.getfixturevalue(which)
    batch, ctx = bench.batch(6), context(bench, public=public(bench))
    out = Obscuring(start=start, floor=0.05, ceiling=0.2, steps=300).on_batch(batch, ctx)
    before, after = pixels(bench, batch), pixels(bench, out)
    assert torch.equal(out.targets, batch.targets)
    assert torch.equal(out.share, batch.share)
    assert torch.allclose(bench.task.bounds.clamp(out.inputs), out.inputs, atol=1e-12), "they exist as pixels"
    errors = ((before - after) ** 2).flatten(1).mean(1)
    assert float(errors.min()) >= 0.05
    assert float(scored_similarity(after, before).mean()) <= 0.2
    features = [bench.task.trace(bench.weights, images).features.numpy() for images in (batch.inputs, out.inputs)]
    blank = bench.task.trace(
        bench.weights, bench.task.bounds.from_pixels(torch.full_like(before, 0.5))
    ).features.numpy()
    distance = ((features[0] - features[1]) ** 2).sum(1) / ((features[0] - blank) ** 2).sum(1)
    other = ((features[0] - np.roll(features[0], 1, axis=0)) ** 2).sum(1) / ((features[0] - blank) ** 2).sum(1)
    # The test's network has more features than there are pixels: they cannot all be kept.
    assert np.median(distance) < 0.2 * np.median(other)
    (noted,) = ctx.notes["MSE to the original"]
    assert torch.allclose(noted, errors, atol=1e-9)
    assert torch.allclose(ctx.notes["feature distance"][0], torch.from_numpy(distance), atol=1e-9)
    assert torch.allclose(ctx.notes["SSIM to the original"][0], similarity.structural_similarity(after, before))
    assert ctx.notes["distinct"][0].tolist() == [1.0] * 6


def test_the_objective_falls_back_to_the_original_where_nothing_is_asked(bench: Any) -> None:
    batch = bench.batch(3)
    open_ = Obscuring(floor=0.0, ceiling=1.0, push=0.0, steps=60).on_batch(batch, context(bench, public=public(bench)))
    far = Obscuring(floor=0.3, ceiling=1.0, steps=60).on_batch(batch, context(bench, public=public(bench)))
    moved = [((pixels(bench, b) - pixels(bench, batch)) ** 2).mean() for b in (open_, far)]
    assert float(moved[1]) > 3 * float(moved[0])


def test_the_weight_of_labels_makes_them_easier(bench: Any) -> None:
    batch = bench.batch(4)

    def entropy(weight: float) -> float:
        out = Obscuring(labels=weight, steps=100).on_batch(batch, context(bench, public=public(bench)))
        chances = torch.softmax(bench.task.logits(bench.weights, out.inputs), -1)
        return float(-(chances * batch.targets).sum(-1).log().mean())

    assert entropy(5.0) < entropy(0.0) - 0.05


def test_the_start_is_a_public_image_of_another_class(bench: Any) -> None:
    batch, known = bench.batch(4), public(bench)
    out = Obscuring(steps=1, lr=1e-9).on_batch(batch, context(bench, public=known))
    gaps = (out.inputs[:, None] - known.inputs[None]).flatten(2).abs().amax(2)
    assert float(gaps.amin(1).max()) < 1e-6
    classes = known.targets.argmax(1)[gaps.argmin(1)]
    assert bool((classes != batch.targets.argmax(1)).all())


def test_similarity_is_that_of_the_metric(bench: Any) -> None:
    a, b = pixels(bench, bench.batch(4)), pixels(bench, bench.batch(4, seed=9))
    for other in (b, a + 0.3 * (b - a), a):
        assert torch.allclose(similarity.structural_similarity(a, other), scored_similarity(a, other), atol=1e-9)


def test_lifted_equals_looped(norm_bench: Any) -> None:
    defense, keys = Obscuring(steps=30, labels=0.5), split(KEY, 3)
    batches = [norm_bench.batch(2, seed) for seed in range(3)]
    joined = Batch(*(torch.stack(parts) for parts in zip(*batches, strict=True)))
    known = public(norm_bench)

    def one(batch: Batch, key: Tensor) -> Tensor:
        return defense.on_batch(batch, context(norm_bench, key=key, public=known)).inputs

    lifted = vmap(one)(joined, keys)
    assert all(torch.allclose(lifted[i], one(batches[i], keys[i]), atol=1e-9) for i in range(3))
    assert not torch.allclose(lifted[0], one(batches[0], keys[1]), atol=1e-3), "the start is drawn"


def test_new_images_come_when_it_is_time_and_for_other_batches(bench: Any) -> None:
    defense, state, known = Obscuring(steps=5, refresh=3), {}, public(bench)  # type: ignore[var-annotated]
    outs = [
        defense.on_batch(
            bench.batch(2), context(bench, state, key=fold_in(KEY, r), round=r, again=r > 0, public=known)
        ).inputs
        for r in range(4)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[2], outs[3], atol=1e-3)
    fresh = defense.on_batch(bench.batch(2, 7), context(bench, state, round=4, public=known)).inputs
    assert not torch.equal(fresh, outs[3]), "a batch that is not known to be the same gets its own"
    again = chain(defense, defense)
    again.on_batch(bench.batch(2), context(bench, state, public=known))
    assert {"0.obscuring", "1.obscuring"} <= set(state), "links of a chain keep their own"


def test_rounds_of_an_episode_reuse_images_only_of_the_same_batch(bench: Any) -> None:
    def updates(repeated: bool, *secret: Batch) -> list[Tensor]:
        threat = ThreatModel(batch_size=2, repeated=repeated)
        seen = observe(bench.task, threat, Obscuring(steps=5, refresh=9), bench.weights, secret, KEY, public(bench))
        return [flatten(one.update) for one in seen]

    a, b = bench.batch(2), bench.batch(2, 3)
    first, second = updates(True, a, a)
    assert torch.allclose(first, second, atol=1e-12)
    first, second = updates(False, a, b)
    alone = Obscuring(steps=5).on_batch(
        b, context(bench, key=fold_in(fold_in(KEY, 1), "defense"), public=public(bench))
    )
    assert torch.allclose(second, flatten(plain_gradient(bench.task)(bench.weights, alone, KEY)), atol=1e-12)
    assert not torch.allclose(first, second, atol=1e-3)


def secret(bench: Any) -> tuple[Batch, ...]:
    return bench.secrets(4)


def see(bench: Any, defense: Obscuring) -> tuple[Any, ...]:
    return bench.see(secret(bench), ThreatModel(), defense)


def found_by(bench: Any, observations: tuple[Any, ...], counter: Counter) -> Tensor:
    attack = ATTACKS.build("idlg", steps=200, start="random")
    keys = split(fold_in(KEY, "attacker"), 4)
    gray = bench.task.bounds.from_pixels(torch.full((4, 1, 1, 1, 8, 8), 0.5, dtype=torch.float64))
    threat = ThreatModel(counter=counter)
    solved = solve(attack, bench.task, threat, observations, None, keys, Shared(bench.weights), None, gray)
    return torch.stack([one.reconstruction.inputs for one in solved])


def test_gradient_inversion_recovers_the_obscured_images_as_it_does_others(bench: Any) -> None:
    defense = Obscuring(steps=200)
    keys = split(fold_in(new_key(0), "test client"), 4)
    own = [fold_in(fold_in(key, 0), "defense") for key in keys]
    obscured = torch.stack(
        [defense.on_batch(bench.batch(1, i), context(bench, key=own[i], public=bench.public)).inputs for i in range(4)]
    )
    plain = found_by(bench, bench.see(secret(bench), ThreatModel()), Counter())
    defended = found_by(bench, see(bench, defense), Counter())
    originals = secret(bench)[0].inputs
    undefended_error = (plain - originals).square().flatten(1).mean(1)
    error = (defended - obscured).square().flatten(1).mean(1)
    assert float(undefended_error.max()) < 1e-3
    assert float(error.max()) < 1e-3, "as well as undefended ones"
    assert float((defended - originals).square().flatten(1).mean(1).min()) > 0.05 / 0.3**2 * 0.99


def test_the_head_alone_tells_of_the_original(make_bench: Any) -> None:
    """Its gradient is (p - y) phi^T by hand, the same for original and obscured image up to the features' error."""
    bench = make_bench("mlp")
    defense, batch = Obscuring(), bench.batch(1)
    ctx = context(bench, public=public(bench))
    (observation,) = observe(bench.task, ThreatModel(), defense, bench.weights, (batch,), KEY, public(bench))
    counter = HeadAlone()
    facts = counter.facts(bench.task, (observation,))
    weight = bench.weights.params["3.weight"]
    features = bench.task.trace(bench.weights, batch.inputs).features
    chances = torch.softmax(features @ weight.T + bench.weights.params["3.bias"], -1)
    by_hand = (chances - batch.targets).T @ features
    full = plain_gradient(bench.task)(bench.weights, batch, KEY)
    mine, theirs = counter.compare(full, observation.update, facts)
    assert set(mine) == set(theirs) == {"3.weight", "3.bias"}
    assert torch.allclose(mine["3.weight"], by_hand, atol=1e-12)
    at_truth = flatten({n: mine[n] - theirs[n] for n in mine}).square().sum() / flatten(theirs).square().sum()
    naive = flatten({n: full[n] - observation.update[n] for n in full}).square().sum()
    naive = naive / flatten(observation.update).square().sum()
    assert float(at_truth) < 0.1 * float(naive)
    assert ctx.notes == {}


def test_feature_inversion_minimises_what_it_says(bench: Any) -> None:
    attack, batch, other = FeatureInversion(tv=0.3), bench.batch(2), bench.batch(2, 5)
    observation = observe(bench.task, ThreatModel(batch_size=2), chain(), bench.weights, (batch,), KEY)
    seen = Seen(observation, {"found.inputs": batch.inputs})
    seen = Seen(observation, {**seen.facts, **attack.infer(bench.task, ThreatModel(batch_size=2), seen, KEY)})
    objective, score = attack.loss(bench.task, ThreatModel(batch_size=2), seen, {"inputs": other.inputs}, KEY)
    # The network by hand: convolution, sigmoid, flatten.
    conv = [bench.weights.params[f"0.{leaf}"] for leaf in ("weight", "bias")]
    gray = torch.full((2, 1, 8, 8), 0.1 / 0.3).double()
    phi = [
        torch.sigmoid(torch.conv2d(x, *conv, stride=2, padding=1)).flatten(1).numpy()
        for x in (other.inputs, batch.inputs, gray)
    ]
    by_hand = (((phi[0] - phi[1]) ** 2).sum(1) / ((phi[1] - phi[2]) ** 2).sum(1)).mean()
    assert float(score) == pytest.approx(by_hand, rel=1e-7)
    assert float(objective) == pytest.approx(by_hand + 0.3 * float(smooth_total_variation(other.inputs)), rel=1e-7)
    at_truth, _ = FeatureInversion(tv=0).loss(
        bench.task, ThreatModel(batch_size=2), seen, {"inputs": batch.inputs}, KEY
    )
    assert float(at_truth) == 0
    assert torch.allclose(blank_features(bench.task, bench.weights, batch.inputs), torch.from_numpy(phi[2]))
    assert feature_distance(*(torch.from_numpy(phi[i]) for i in (2, 1, 2))).tolist() == pytest.approx([1, 1])


def test_who_inverts_features_comes_nearer_to_smooth_images_than_who_does_not(make_bench: Any) -> None:
    bench = make_bench("mlp")  # 24 features of 64 pixels
    (noisy,) = secret(bench)
    coarse = bench.task.bounds.to_pixels(noisy.inputs)[..., :3, :3]
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(8, 8), mode="bilinear").unflatten(0, (4, 1))
    originals = bench.task.bounds.from_pixels(smooth)
    observations = bench.see((noisy._replace(inputs=originals),), ThreatModel(), Obscuring(steps=200))

    def error(counter: Counter) -> float:
        return float((found_by(bench, observations, counter) - originals).square().mean())

    naive, inverted = error(Counter()), error(InvertFeatures())
    assert naive > 0.05 / 0.3**2 * 0.9
    assert inverted < 0.5 * naive


def test_what_it_says_of_itself() -> None:
    assert Obscuring().remark({"distinct": [1.0, 1.0]}) == ""
    assert Obscuring().remark({"distinct": [1.0, 0.0, 0.5]}).startswith("2 of 3 images")
