"""DLG: labels are unknowns beside the images; its objective by hand, and images and labels that it must find."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from keyhole.attacks.dlg import dlg
from keyhole.attacks.idlg import idlg
from keyhole.attacks.matching import OPTIMISED
from keyhole.core.belief import exact, order_unknown
from keyhole.core.defense import chain
from keyhole.core.keys import fold_in, new_key, normal, permutation, split
from keyhole.core.rule import LocalSGD
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Seen
from keyhole.errors import ConfigError
from keyhole.solve.drive import solve
from keyhole.solve.lift import Shared, stack

KEY = new_key(43)


def gray(bench: Any, trials: int, starts: int, size: int) -> Tensor:
    flat = 0.5 + 0.01 * normal(KEY, (trials, starts, size, *bench.task.input_shape), torch.float64)
    return bench.task.bounds.from_pixels(flat)


def state_of(bench: Any, threat: ThreatModel, attack: Any, size: int) -> Seen:
    (seen,) = observe(bench.task, threat, chain(), bench.weights, (bench.batch(size, 1),), KEY)
    return Seen((seen,), attack.infer(bench.task, threat, Seen((seen,), {}), KEY))


@pytest.mark.parametrize("size", [1, 3])
def test_the_objective_by_hand(size: int, bench: Any) -> None:
    """Equation 4 of the paper over the observed norm, by a loaded module and torch.autograd."""
    threat, attack = ThreatModel(batch_size=size), dlg()
    state = state_of(bench, threat, attack, size)
    x = normal(KEY, (size, 1, 8, 8), torch.float64)
    logits = normal(fold_in(KEY, "l"), (size, 4), torch.float64)
    model = copy.deepcopy(bench.task.model)
    model.load_state_dict(bench.weights.params)
    loss = torch.nn.functional.cross_entropy(model(x), torch.softmax(logits, -1))
    guess = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    truth = torch.cat([t.flatten() for t in state.observations[0].update.values()])
    value, score = attack.loss(bench.task, threat, state, {"inputs": x, "labels": logits}, KEY)
    assert float(value) == float(score)
    assert float(value) == pytest.approx(float((guess - truth).square().sum() / truth.square().sum()), rel=1e-10)


def test_it_reads_no_label_off_anything(bench: Any) -> None:
    attack = dlg()
    assert attack.needs == {"weights", "update"}
    assert attack.labels == OPTIMISED
    assert set(state_of(bench, ThreatModel(batch_size=2), attack, 2).facts) == {"square", "client"}


def test_its_labels_begin_as_noise_of_their_own(bench: Any) -> None:
    threat, attack = ThreatModel(batch_size=50), dlg(start="random")
    state = Seen((), {"square": torch.zeros(()).double()})
    first = attack.start(bench.task, threat, state, None, KEY)
    assert {n: tuple(v.shape) for n, v in first.items()} == {"inputs": (50, 1, 8, 8), "labels": (50, 4)}
    assert abs(float(first["labels"].mean())) < 0.3
    assert abs(float(first["labels"].std()) - 1) < 0.2
    assert first["labels"].dtype == torch.float64
    other = attack.start(bench.task, threat, state, None, fold_in(KEY, 1))
    assert not torch.equal(first["labels"], other["labels"])
    # Not the numbers that the images begin with.
    assert not torch.equal(first["labels"].flatten(), first["inputs"].flatten()[:200])


def test_it_finds_images_and_labels(bench: Any) -> None:
    secret = bench.secrets(4)[0]
    seen = bench.see((secret,), ThreatModel())
    attack = dlg(steps=200, tolerance=1e-12)
    starts = gray(bench, 4, attack.restarts, 1)
    solved = solve(attack, bench.task, ThreatModel(), seen, starts, split(KEY, 4), Shared(bench.weights))
    for i, one in enumerate(solved):
        assert one.status == "converged"
        assert float(one.reconstruction.score) <= 1e-12
        assert torch.allclose(one.reconstruction.targets.sum(-1), torch.ones(1).double())
        assert torch.allclose(one.reconstruction.targets, secret.targets[i], atol=1e-3)
        to_pixels = bench.task.bounds.to_pixels
        assert float((to_pixels(one.reconstruction.inputs) - to_pixels(secret.inputs[i])).square().mean()) < 1e-6


def test_it_finds_soft_labels_too(bench: Any) -> None:
    """What no rule for hard labels can do."""
    soft = torch.tensor([[0.7, 0.1, 0.2, 0.0]]).double()
    batch = bench.batch(1)._replace(targets=soft)
    (seen,) = observe(bench.task, ThreatModel(), chain(), bench.weights, (batch,), KEY)
    lifted = (seen._replace(update={n: v[None] for n, v in seen.update.items()}),)
    attack = dlg(steps=400, tolerance=1e-12)
    starts = gray(bench, 1, attack.restarts, 1)
    (one,) = solve(attack, bench.task, ThreatModel(), lifted, starts, KEY[None], Shared(bench.weights))
    assert torch.allclose(one.reconstruction.targets, soft, atol=1e-2)


def test_another_start_follows_a_wrong_label(bench: Any) -> None:
    """Of many trials with one start some fail; with four each of them is tried again, and more end at the tolerance."""
    secret = bench.secrets(8)[0]
    seen, keys = bench.see((secret,), ThreatModel()), split(KEY, 8)
    ended = []
    for restarts in (1, 4):
        attack = dlg(steps=60, restarts=restarts, tolerance=1e-6)
        starts = gray(bench, 8, 4, 1)[:, :restarts]
        ended.append(solve(attack, bench.task, ThreatModel(), seen, starts, keys, Shared(bench.weights)))
    alone, several = ended
    assert sum(one.status != "converged" for one in alone) > 0
    assert sum(one.status == "converged" for one in several) > sum(one.status == "converged" for one in alone)
    for one, more in zip(alone, several, strict=True):
        if one.status == "converged":
            assert torch.allclose(one.reconstruction.inputs, more.reconstruction.inputs, atol=1e-9)
            assert abs(one.evaluations - more.evaluations) <= 10
        else:
            assert more.evaluations > one.evaluations
        assert float(more.reconstruction.score) <= float(one.reconstruction.score)


def test_the_self_test_is_given_the_labels(bench: Any) -> None:
    told = dlg().at_truth()
    assert told.needs == {"weights", "update", "targets"}
    assert told.labels == "given"
    assert told.distance is dlg().distance


@pytest.mark.parametrize("make", [idlg, dlg])
def test_every_epoch_of_an_unknown_order_has_its_own_guesses(make: Any, bench: Any) -> None:
    rule = LocalSGD(3, 0.1, 1)
    threat, attack = ThreatModel(rule, order_unknown(rule), 2), make()
    state = Seen((), {"square": torch.zeros(()).double(), "targets": torch.eye(4).double()[[0, 2, 0, 2, 0, 2]]})
    images = bench.batch(2).inputs
    begun = attack.start(bench.task, threat, state, images, KEY)
    assert torch.equal(begun["inputs"], torch.cat([images] * 3))
    noise = attack.start(bench.task, threat, state, None, KEY)["inputs"]
    assert noise.shape == (6, 1, 8, 8)
    assert not torch.equal(noise[:2], noise[2:4])
    answer = attack.decode(bench.task, threat, state, begun, torch.zeros(()))
    assert torch.allclose(answer.inputs, images, rtol=1e-14)
    assert answer.targets.shape == (2, 4)


def test_the_agreement_of_epochs_is_a_prior_and_no_score(bench: Any) -> None:
    rule = LocalSGD(2, 0.1, 1)
    attack = idlg(labels="given")
    values = []
    for belief in (order_unknown(rule, agreement=0.0), order_unknown(rule, agreement=0.5)):
        threat = ThreatModel(rule, belief, 2, frozenset({"weights", "update", "targets"}))
        state = state_of(bench, threat, attack, 2)
        x = normal(KEY, (4, 1, 8, 8), torch.float64)
        open_order = threat.unknowns(bench.task, x, KEY)
        values.append([float(v) for v in attack.loss(bench.task, threat, state, {"inputs": x, **open_order}, KEY)])
    assert values[0][1] == values[1][1] == values[0][0]
    means = x[:2].mean(0), x[2:].mean(0)
    deviation = float((((means[0] - means[1]) / 2) ** 2).mean())
    assert values[1][0] - values[1][1] == pytest.approx(0.5 * deviation, rel=1e-10)


def test_local_steps_are_inverted(bench: Any) -> None:
    """Two images through four steps: the attacker who knows them finds what was trained on."""
    rule = LocalSGD(2, 0.1, 1)
    threat = ThreatModel(rule, exact(rule), 2, frozenset({"weights", "update", "targets"}))
    secret = bench.secrets(1, 2)[0]
    seen = bench.see((secret,), threat)
    attack = idlg(labels="given", steps=200, tolerance=1e-8)
    (one,) = solve(attack, bench.task, threat, seen, gray(bench, 1, 1, 2), KEY[None], Shared(bench.weights))
    assert one.status == "converged"
    to_pixels = bench.task.bounds.to_pixels
    assert float((to_pixels(one.reconstruction.inputs) - to_pixels(secret.inputs[0])).square().mean()) < 1e-3


def test_local_steps_in_an_unknown_order_are_inverted(bench: Any) -> None:
    """Two images of two classes, one a step: found if the client happens to go by class, and also if it does not."""
    rule = LocalSGD(2, 0.3, 1, "shuffled")
    threat = ThreatModel(rule, order_unknown(rule), 2, frozenset({"weights", "update", "targets"}))
    batch = bench.batch(2)
    attack = idlg(labels="given", steps=250, restarts=4, tolerance=1e-6)
    shared, clients = Shared(bench.weights), [new_key(seed) for seed in (1, 2, 3, 5)]
    own = [fold_in(fold_in(key, 0), "client") for key in clients]
    begins = {tuple(int(permutation(fold_in(key, f"order {e}"), 2)[0]) for e in range(2)) for key in own}
    assert begins == {(0, 0), (0, 1), (1, 1)}, "some clients go by class and some do not"
    each = [observe(bench.task, threat, chain(), bench.weights, (batch,), key)[0] for key in clients]
    seen = (stack(each, shared),)
    for one in solve(attack, bench.task, threat, seen, gray(bench, 4, 4, 2), split(KEY, 4), shared):
        found = one.reconstruction
        order = found.targets.argmax(-1).argsort()
        assert (found.targets[order] - batch.targets).abs().max() < 0.01
        pixels = [bench.task.bounds.to_pixels(x) for x in (found.inputs[order], batch.inputs)]
        assert float((pixels[0] - pixels[1]).square().mean()) < 1e-3


def test_a_prior_switches_the_tolerance_off() -> None:
    assert dlg(tolerance=1e-5).tolerance == 1e-5
    assert dlg(tolerance=1e-5, tv=1e-4).tolerance == 0


@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"tv": -1.0}, {"tolerance": -1.0}, {"history": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dlg(**options)
