"""A defended app's transcript says the same of its images as an audit in one process, for the same key."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.clientapp import ClientApp
from quickstart_case import quickstart, run

from keyhole.core.belief import Simulated
from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, new_key
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Key, Observation, Tensors, Weights
from keyhole.experiment.recorded import audit_transcript
from keyhole.experiment.transcript import read_secret
from keyhole.fl import DefenseMod
from keyhole.fl.mods import round_key
from keyhole.metrics.image import structural_similarity
from keyhole.solve.drive import Solved, solve
from keyhole.solve.lift import Shared, stack

LR = 0.3
ONE = {"images": 1, "batch_size": 1, "local_epochs": 1, "rounds": 1, "lr": LR}
OPTIONS = {"steps": 80, "restarts": 1, "tv": 0.0}


@dataclass(frozen=True)
class Keyed(Defense):
    """A defense that draws from one given key, whichever it is called with."""

    inner: Defense
    key: Key

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        return self.inner.on_update(update, replace(ctx, key=self.key))


def in_process(
    net: nn.Module, defense: Defense, weights: Weights, secret: Any, key: Key
) -> tuple[Observation, Task, LocalSGD]:
    """What Keyhole's own simulation of the client lets an attacker see."""
    task, rule = Task.of(net, (1, 8, 8), 10, Bounds.of((0.0,), (1.0,))), LocalSGD(1, LR, 1)
    threat = ThreatModel(rule, Simulated(rule), 1)
    batch = Batch(secret.inputs, nn.functional.one_hot(secret.labels, 10).float(), torch.ones(1))
    (seen,) = observe(task, threat, Keyed(defense, key), weights, (batch,), new_key(0))
    return seen, task, rule


def attacked(seen: Observation, task: Task, rule: LocalSGD, counter: Counter, key: Key) -> Solved:
    shared = Shared(seen.weights)
    threat = ThreatModel(rule, Simulated(rule), 1, counter=counter)
    attack = ATTACKS.build("inverting_gradients", **OPTIONS)
    (found,) = solve(attack, task, threat, (stack([seen], shared),), None, key[None], shared)
    return found


def pixels(task: Task, one: Solved) -> Tensor:
    return task.bounds.to_pixels(one.reconstruction.inputs).detach()


@pytest.mark.parametrize(("name", "options"), [("random_masking", {"rate": 0.3}), ("gaussian_noise", {"std": 1e-4})])
def test_the_transcript_of_a_defended_app_gives_what_the_simulated_client_gives(
    name: str, options: dict[str, float], tmp_path: Path
) -> None:
    defense = DEFENSES.build(name, **options)
    with quickstart(tmp_path, "record", "secrets") as folder:
        client = importlib.import_module("quickstart.client_app")
        net = importlib.import_module("quickstart.model").Net()
        plain = client.app
        client.app = ClientApp(mods=[DefenseMod(defense, net, seed=5)])
        client.app.train()(plain._registered_funcs["train.default"])
        run(folder, 2, **ONE)
        told = f"{{name='inverting_gradients',steps={OPTIONS['steps']},restarts=1,tv=0.0}}"
        known = f"{{name='{name}',{','.join(f'{k}={v}' for k, v in options.items())}}}"
        changes = (f"attacks=[{told}]", f"defense=[{known}]", "most=1")
        (finding,) = audit_transcript(folder / "transcript", "quickstart.model:Net", changes=changes).found
        one = finding.update
        secret = read_secret(folder / "secrets", 1, one.client)
    assert secret is not None
    seen, task, rule = in_process(net, defense, one.weights, secret, round_key(5, 0, 1))
    for parameter, value in one.update.items():
        # Weights are sent and not updates: that rounds.
        assert torch.allclose(value, seen.update[parameter], rtol=0, atol=1e-7), parameter  # type: ignore[index]

    key = fold_in(new_key(0), f"transcript 1 {one.client}")
    counters = [Counter(), *defense.counters()]
    assert len(finding.attempts) == len(counters) > 1
    for attempt, counter in zip(finding.attempts, counters, strict=True):
        same = attacked(one.observation, task, rule, counter, key)
        assert torch.equal(attempt.guesses, pixels(task, same)), counter.name
        assert attempt.score == float(same.reconstruction.score)
        own = attacked(seen, task, rule, counter, key)
        # Signs of gradients are followed, which a last bit may turn: what comes out is compared, and not each step.
        mine, theirs = (float(structural_similarity(x, secret.inputs)) for x in (pixels(task, own), attempt.guesses))
        assert mine == pytest.approx(theirs, abs=0.02)
        assert float(own.reconstruction.score) == pytest.approx(attempt.score, rel=0.02)
