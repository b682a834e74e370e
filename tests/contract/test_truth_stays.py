"""Started at the truth, an attack that knows what the client did must stay: under every rule, mode and defense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attack_cases import ITERATIVE, options
from defense_cases import PAIRS, label

from keyhole.core.attack import IterativeAttack
from keyhole.core.defense import Counter, Defense, chain
from keyhole.core.keys import new_key, split
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.threat import ThreatModel
from keyhole.core.trial import Spec
from keyhole.experiment.plan import Group, choose, plan
from keyhole.experiment.run import run_group
from keyhole.experiment.setup import prepare
from keyhole.experiment.spec import parse_experiment
from keyhole.solve.drive import solve
from keyhole.solve.lift import Shared

GIVEN = frozenset({"weights", "update", "targets"})
SELF_TEST = {"labels": "given", "restarts": 1, "steps": 10, "tv": 0.0, "history": 8}
each_iterative = pytest.mark.parametrize("name", ITERATIVE)

DEFENDED = [None, *PAIRS, (("clip", {"norm": 0.05}), ("prune", {"rate": 0.5}))]


def defense_of(case: Any) -> Defense:
    if case is None:
        return chain()
    pairs = [case] if isinstance(case[0], str) else case
    return chain(*(DEFENSES.build(name, **given) for name, given in pairs))


@each_iterative
@pytest.mark.parametrize("case", DEFENDED, ids=label)
def test_under_every_defense_whose_counter_promises_it(name: str, case: Any, bench: Any) -> None:
    attack = ATTACKS.build(name, **options(name, SELF_TEST))
    assert isinstance(attack, IterativeAttack)
    attack = attack.at_truth()
    defense = defense_of(case)
    bench = bench.under(defense)
    # Whoever tests itself is told what layers drew.
    sees = GIVEN | {"masks"} if bench.task.draws else GIVEN
    counters = [c for c in defense.counters() if c.truth_loss == "zero"] if case else [Counter()]
    for size, counter in itertools.product((1, 2) if case is None else (2,), counters):
        secret = bench.secrets(3, size)
        seen = bench.see(secret, ThreatModel(batch_size=size, sees=sees), defense)
        threat = ThreatModel(batch_size=size, sees=sees, counter=counter)
        truth = secret[0].inputs
        solved = solve(attack, bench.task, threat, seen, truth[:, None], split(new_key(61), 3), Shared(bench.weights))
        for i, one in enumerate(solved):
            # One minus a cosine is exact to the last bits of 1 and no further.
            limit = 1e-14 if "cosine" in repr(attack.distance) else 1e-20  # type: ignore[attr-defined]
            assert abs(float(one.reconstruction.score)) < limit
            assert torch.allclose(one.reconstruction.inputs, truth[i], rtol=0, atol=1e-9)
            assert one.status in ("converged", "budget", "stalled")


# Through the runner, as `keyhole audit` plans it

GRADIENT = Spec.of("gradient")
ONE_STEP = Spec.of("sgd", {"epochs": 1, "lr": 0.2, "batch_size": 4})
MANY = Spec.of("sgd", {"epochs": 2, "lr": 0.2, "batch_size": 1})
UNEVEN = Spec.of("sgd", {"epochs": 2, "lr": 0.2, "batch_size": 2})
IN_ANY_ORDER = Spec.of("sgd", {"epochs": 2, "lr": 0.2, "batch_size": 3, "order": "shuffled"})
MASKED = (("random_masking", {"rate": 0.5}),)
SEES = ("update", "weights")
SHARED = ("statistics", "update", "weights")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{rule_name}, {mode}": (
        {"model": "conv_norm", "batchnorm": mode},
        {"rule": rule, "sees": SHARED if mode == "train_shared" else SEES},
    )
    for (rule_name, rule), mode in itertools.product(
        {"gradient": GRADIENT, "one step": ONE_STEP, "many steps": MANY}.items(),
        ("eval", "train_shared", "train_hidden"),
    )
} | {
    "gradient": ({}, {}),
    "gradient, masked": ({}, {"defense": MASKED}),
    "many steps": ({}, {"rule": MANY}),
    "many steps, masked": ({}, {"rule": MANY, "defense": MASKED}),
    "uneven steps": ({}, {"rule": UNEVEN, "batch_size": 3, "episode": (1, 2, 3)}),
    "any order that does not matter": ({}, {"rule": IN_ANY_ORDER}),
    "dropout": ({"model": "conv_drop", "dropout": "active"}, {}),
    "dropout, told the masks": ({"model": "conv_drop", "dropout": "active"}, {"sees": ("masks", *SEES)}),
    "dropout, masked": ({"model": "conv_drop", "dropout": "active"}, {"defense": MASKED}),
    "dropout and batch statistics": (
        {"model": "conv_all", "dropout": "active", "batchnorm": "train_shared"},
        {"sees": SHARED},
    ),
    "a series": ({"networks": 2}, {"fresh": True, "episode": (3, 1, 0, 2)}),
    "a series of local steps": ({}, {"rule": MANY, "episode": (3, 1, 0, 2)}),
    "rounds": ({}, {"rounds": 3}),
    "rounds, masked": ({}, {"rounds": 3, "defense": MASKED}),
}
"""What the runner is given: options of `make_setup` and fields of the trial."""


@each_iterative
@pytest.mark.parametrize("case", CASES)
def test_in_every_rule_and_mode(name: str, case: str, make_setup: Any, make_trial: Any) -> None:
    made, fields = CASES[case]
    # Labels out of order: the runner sorts them, as a client does.
    given = {"episode": (3, 1), "batch_size": 2, "attacker": "check:truth", **fields}
    trial = make_trial(name, options(name, SELF_TEST), **given)
    (outcome,) = run_group(Group((trial,)), make_setup(**made)).outcomes
    assert outcome.status in ("converged", "budget", "stalled"), outcome.detail
    assert abs(outcome.facts["truth_loss"]) < 1e-14
    assert max(outcome.metrics["mse"]) < 1e-14
    assert min(outcome.metrics["ssim"]) > 1 - 1e-9


@pytest.mark.parametrize(
    ("chain", "client", "stays"),
    [
        (("top_k",), {}, True),
        (("top_k",), {"rounds": 3}, True),
        (("top_k",), {"series": 2}, False),
        (("random_masking",), {"rounds": 3}, True),
        (("random_masking", "clip"), {}, True),
        (("random_masking", "clip"), {"rounds": 3}, False),
        (("random_masking", "top_k"), {"rounds": 2}, False),
        (("clip", "prune"), {"rounds": 3}, False),  # nothing is drawn here, but the chain cannot know
        (("clip", "prune"), {"series": 2}, True),
        (("gaussian_noise",), {}, False),
        (("soteria",), {}, True),
        (("soteria",), {"rule": "sgd", "epochs": 2, "lr": 0.1}, False),
        (("random_masking",), {"rule": "sgd", "epochs": 2, "lr": 0.1}, True),
    ],
)
def test_the_plan_runs_it_only_where_the_promise_holds(
    chain: tuple[str, ...], client: dict[str, Any], stays: bool, tmp_path: Any
) -> None:
    raw = {
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "client": client,
        "attacks": [{"name": "idlg", "steps": 5}],
        "defenses": [{"chain": [{"name": name, **dict(PAIRS)[name]} for name in chain]}],
        "run": {"samples": 2},
    }
    experiment = parse_experiment(raw)
    setup = prepare(experiment, torch.device("cpu"))
    chosen = choose(experiment, setup, [])
    trials = [t for group in plan(experiment, setup, chosen) for t in group.trials if t.attacker == "check:truth"]
    assert any(not t.defense for t in trials)
    checked = [t for t in trials if t.defense]
    assert bool(checked) == stays
    for trial in checked[:1]:
        (outcome,) = run_group(Group((trial,)), setup).outcomes
        assert abs(outcome.facts["truth_loss"]) < 1e-9


@each_iterative
def test_it_leaves_where_a_step_is_taken_for_another(name: str, make_setup: Any, make_trial: Any) -> None:
    """The test above can fail: one who believes in another learning rate or one gradient does not stay."""
    for belief in (Spec.of("sgd", {"lr": 0.1}), Spec.of("gradient")):
        fields = {"episode": (3, 1), "batch_size": 2, "attacker": "check:truth", "rule": MANY, "belief": belief}
        trial = make_trial(name, options(name, SELF_TEST), **fields)
        (outcome,) = run_group(Group((trial,)), make_setup()).outcomes
        assert outcome.facts["truth_loss"] > 1e-9
