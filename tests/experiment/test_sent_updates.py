"""What clients themselves sent: written down as it was, attacked as it is, and counted in the report."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keyhole.core.rule import LocalSGD
from keyhole.errors import ConfigError, ModelError
from keyhole.experiment import recorded_work
from keyhole.experiment.frontier import frontier
from keyhole.experiment.recorded import audit_transcript
from keyhole.experiment.sent_updates import FOLDER, PICTURES, Trainings, attack_sent, training_of
from keyhole.experiment.train import Problem, Trained, train
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.experiment.transcript import Recorded, read_secret, read_transcript
from keyhole.metrics.image import structural_similarity
from keyhole.report.frontier import write_frontier
from keyhole.report.names import defense_name
from keyhole.report.sent import sent_in_words, sent_table, worst

FILE = """
[data]
name = "digits"
target = 2
tune = 0
public = 8
candidates = 0
test = 50
train = 1

[model]
name = "lenet_zhu"

[federation]
clients = 3
rounds = 2
epochs = 1
batch_size = 1
lr = 0.1
momentum = 0.0

[[defenses]]
chain = [{ name = "random_masking", rate = 0.5 }]

[audit]
rounds = [0, 2]

[[audit.attacks]]
name = "idlg"
steps = 4

[audit.run]
samples = 1
images = "all"

[audit.sent]
clients = 1

[[audit.sent.attacks]]
name = "inverting_gradients"
steps = 250
restarts = 1
tv = 0.0
"""


def plan_of(**changes: dict[str, Any]) -> TrainingPlan:
    """Three clients of one image each, with other keys in some sections."""
    raw = tomllib.loads(FILE)
    for section, keys in changes.items():
        own = raw
        for name in section.split("_"):
            own = own[name]
        own |= keys
    return parse_training(raw, "small")


Run = tuple[TrainingPlan, Path, list[Trained], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan, folder = plan_of(), tmp_path_factory.mktemp("sent")
    done = frontier(plan, folder, name=defense_name, jobs=1)
    write_frontier(plan, done, folder)
    return plan, folder, done, json.loads((folder / "report.json").read_text())


def test_the_transcript_is_of_the_networks_that_were_trained(run: Run) -> None:
    """Without momentum or noise the mean of what clients sent leads from one kept network to the next."""
    plan, _, done, _ = run
    assert plan.recorded == (1, 2)
    task = Problem(plan, torch.device("cpu")).task(())
    for one in done:
        transcript = read_transcript(one.folder / "transcript", task.model)
        assert [(u.round, u.client, u.examples) for u in transcript.updates] == [
            (number, client, 1) for number in (1, 2) for client in "012"
        ]
        for number in (1, 2):
            before, after = (load_file(one.checkpoint(n)) for n in (number - 1, number))
            sent = [u for u in transcript.updates if u.round == number]
            for name, value in before.items():
                assert all(torch.equal(u.weights.params[name], value) for u in sent)
                mean = torch.stack([u.update[name] for u in sent]).mean(0)
                torch.testing.assert_close(value - mean, after[name], rtol=0, atol=1e-6)


def test_the_secrets_are_what_each_client_trained_on(run: Run) -> None:
    """One step of torch's own, clipped as its own function clips, makes the update of them."""
    plan, _, done, _ = run
    problem = Problem(plan, torch.device("cpu"))
    model = problem.network(0)
    bare = done[0]
    for one in read_transcript(bare.folder / "transcript", model, [1]).updates:
        secret = read_secret(bare.folder / "secrets", 1, one.client)
        # Only of clients that are attacked.
        assert (secret is not None) == (one.client == "0")
        if secret is None:
            continue
        model.load_state_dict(load_file(bare.checkpoint(0)))
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(secret.inputs), secret.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(one.update[name], 0.1 * parameter.grad, rtol=1e-4, atol=1e-7)


def test_an_image_comes_back_from_what_its_client_sent(run: Run) -> None:
    _, _, _, report = run
    assert [(u["defense"], u["round"], u["client"]) for u in report["sent"]] == [
        (defense, number, client)
        for defense in ("none", "random_masking(rate=0.5)") for number in (1, 2) for client in "0"
    ]  # fmt: skip
    for update in report["sent"]:
        assert (update["images"], update["steps"]) == (1, 1)
        naive = update["attacks"][0]
        assert naive["attacker"] == "naive"
        if update["defense"] == "none":
            assert naive["metrics"]["ssim"][0] > 0.9 > naive["control"]["ssim"][0] + 0.2
            assert naive["metrics"]["label_accuracy"] == [1.0] and naive["score"] < 1e-3
            # Said before it was tried.
            assert update["prediction"] == "likely recoverable"
        else:
            assert [one["attacker"] for one in update["attacks"]] == ["naive", "adaptive:survivors"]
            # Half of the entries are gone; who knows which finds the image all the same.
            adaptive = update["attacks"][1]
            assert naive["metrics"]["ssim"][0] < 0.5 < 0.9 < adaptive["metrics"]["ssim"][0]


def test_the_report_counts_them(run: Run) -> None:
    _, folder, _, report = run
    assert (
        "Of what clients themselves sent (1 image, 1 step an update) 2 of 2 images leaked without a defense and"
        in (report["answer"])
    )
    page = (folder / "report.html").read_text()
    section = page[page.index("<h2>What clients themselves sent") : page.index("<h2>Updates of single images")]
    assert section.count("1 image, 1 step") == 4 and "1 of 1" in section
    # Pictures of both rounds without a defense: a secret and what was found of it.
    assert section.count("Sent in round") >= 2 and section.count("data:image/png") == 4


def test_what_is_done_is_not_done_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder, done, report = run
    monkeypatch.setattr(recorded_work, "attempt", None)
    assert [one.asdict(defense_name) for one in attack_sent(plan, done, folder)] == report["sent"]
    again = frontier(plan, folder, name=defense_name, jobs=1)
    write_frontier(plan, again, folder)
    assert json.loads((folder / "report.json").read_text()) == report


def test_a_training_without_them_records_nothing_and_no_pictures_are_kept_unasked(tmp_path: Path) -> None:
    raw = tomllib.loads(FILE)
    del raw["audit"]["sent"]
    plan = parse_training(raw, "small")
    assert plan.recorded == () and attack_sent(plan, [], tmp_path) == []
    (one, *_) = train(plan.model_copy(update={"defenses": ((),)}), tmp_path / "a")
    assert not (one.folder / "transcript").exists() and not (one.folder / "secrets").exists()
    brief = plan_of(audit={"rounds": [0]}, audit_run={"images": "none"}, audit_sent={"clients": 1})
    brief = brief.model_copy(update={"defenses": ((),)})
    frontier(brief, tmp_path / "b", name=defense_name, jobs=1)
    assert (tmp_path / "b" / "sent.json").exists() and not (tmp_path / "b" / FOLDER / PICTURES).exists()


def test_the_transcript_is_one_like_any_other(run: Run) -> None:
    _, _, done, report = run
    brief = 'attacks=[{name="inverting_gradients",steps=250,restarts=1,tv=0.0}]'
    known = ("shape=[1,8,8]", "classes=10", "clients=['0']".replace("'", '"'), "rounds=[1]", brief)
    found = audit_transcript(done[0].folder / "transcript", "lenet_zhu", done[0].folder / "secrets", known)
    (finding,) = found.found
    assert finding.training.words[1] == "learning rate 0.1, from the recorded config"
    assert finding.attempts[0].metrics["ssim"][0] > 0.9


def fake(task: Any, images: int) -> Recorded:
    weights = Problem(plan_of(), torch.device("cpu")).fresh((), 0)
    return Recorded(
        1, "0", weights, {name: torch.ones_like(value) for name, value in weights.params.items()}, images, {}
    )


def test_how_clients_trained_is_known_from_the_plan() -> None:
    task = Trainings(plan_of())(0)[1]
    free = {"clip": 0.0, "lr": 0.2, "epochs": 2, "batch_size": 4}
    found = training_of(plan_of(federation={**free, "momentum": 0.5}).federation, task, fake(task, 10))
    assert (found.images, found.steps, found.scale_known) == (10, 6, True)
    # By hand: the k-th step is as long as a sum of powers of the momentum.
    longer = sum(sum(0.5**j for j in range(k)) for k in range(1, 7)) / 6
    assert found.rule == LocalSGD(2, found.rule.lr, 4, "shuffled") and found.rule.lr == pytest.approx(0.2 * longer)
    assert found.assumed, "two of its images are twice in an epoch"
    even = training_of(plan_of(federation={**free, "momentum": 0.0}).federation, task, fake(task, 8))
    assert even.rule == LocalSGD(2, 0.2, 4, "shuffled") and not even.assumed
    clipped = training_of(plan_of(federation={**free, "clip": 1.0}).federation, task, fake(task, 8))
    assert not clipped.scale_known and any("lengths of steps are not known" in words for words in clipped.words)


def test_updates_that_are_too_much_to_attack_are_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyhole.experiment.train.MOST", 1)
    with pytest.raises(ConfigError, match=r"a client has 1 images and takes 2 steps a round; up to 1 of each"):
        train(plan_of(federation={"epochs": 2}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def update(*ssim: float, guess: float = 0.1, mean: float = 0.2, refused: bool = False) -> dict[str, Any]:
    """As in sent.json, of one attacker."""
    count = len(ssim)
    scores = {} if refused else {"ssim": list(ssim), "label_accuracy": [1.0] * count}
    return {
        "file": "x", "defense": "none", "seed": 0, "round": 1, "client": "0", "images": count, "steps": 1,
        "training": [], "prediction": "partly", "class_mean": [mean] * count,
        "attacks": [{
            "attack": "idlg", "attacker": "naive", "status": "refused" if refused else "budget", "detail": "",
            "evaluations": 1, "metrics": scores, "control": {} if refused else {"ssim": [guess] * count},
        }],
    }  # fmt: skip


def test_a_leak_must_beat_noise_and_the_mean_image_of_its_class() -> None:
    assert worst(update(0.9, 0.75, 0.6)).leaks == 2  # type: ignore[union-attr]
    assert worst(update(0.9, 0.75, 0.6, mean=0.7)).leaks == 1  # type: ignore[union-attr]
    assert worst(update(0.9, 0.75, 0.6, guess=0.7)).leaks == 1  # type: ignore[union-attr]


def test_what_was_refused_counts_neither_as_leaked_nor_as_held() -> None:
    refused, found = update(0.0, 0.0, refused=True), update(0.9, -0.3)
    assert worst(refused) is None
    both = {**found, "attacks": [*refused["attacks"], *found["attacks"]]}
    assert worst(both).leaks == 1, "an attack that ran is worse than one that was refused"  # type: ignore[union-attr]
    assert sent_table([refused])[1][5] == "\N{EN DASH}"
    assert sent_in_words([refused]) == (
        "Of what clients themselves sent (2 images, 1 step an update) no attack could be scored without a defense."
    )
    assert "1 of 2 (1 of 2 updates not scored) images leaked without a defense" in sent_in_words([refused, found])


def test_the_mean_image_of_the_class_is_that_of_the_public_pool(run: Run) -> None:
    plan, _, done, report = run
    data = Problem(plan, torch.device("cpu")).data
    secret = read_secret(done[0].folder / "secrets", 1, "0")
    assert secret is not None
    own = data.public.images[data.public.labels == secret.labels[0]]
    mean = (own if len(own) else data.public.images).mean(0, keepdim=True)
    expected = float(structural_similarity(mean, secret.inputs))
    assert report["sent"][0]["class_mean"] == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("audit_sent", {"clients": 4}, "audit.sent.clients is 4, of 3 clients"),
        ("audit_sent", {"clients": 0}, "clients"),
        ("audit_sent", {"cleints": 1}, "did you mean 'clients'|cleints"),
        ("audit_sent", {"attacks": [{"name": "idgl"}]}, "did you mean 'idlg'"),
        ("audit_sent", {"attacks": [{"name": "idlg", "steps": 0}]}, "steps"),
        ("audit", {"sent": 3}, "audit.sent"),
    ],
)
def test_a_wrong_section_is_said_in_a_sentence(section: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(**{section: keys})


def test_a_plan_reads_its_own_file_back() -> None:
    plan = plan_of()
    assert parse_training(tomllib.loads(plan.to_toml())) == plan


@pytest.mark.parametrize("defense", ["mid", "bido", "dp_sgd"])
def test_defenses_that_change_the_model_or_the_training_are_attacked_too(tmp_path: Path, defense: str) -> None:
    plan = plan_of(
        audit={"rounds": [0]}, audit_sent={"clients": 1, "attacks": [{"name": "inverting_gradients", "steps": 3}]}
    )
    raw = {**tomllib.loads(plan.to_toml()), "defenses": [{"chain": [{"name": defense}]}]}
    plan = parse_training(raw, "small")
    done = train(plan, tmp_path)
    found = attack_sent(plan, done, tmp_path)
    assert [len(one.finding.attempts[0].metrics["ssim"]) for one in found] == [1, 1]
    assert len(found[1].finding.attempts) > 1


def test_frozen_layers_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frozen_nets.py").write_text(
        "from torch import nn\n"
        "def make(input_shape, num_classes):\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, num_classes))\n"
        "    model[1].requires_grad_(False)\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    raw = {**tomllib.loads(FILE), "model": {"factory": "frozen_nets:make"}}
    with pytest.raises(ModelError, match='frozen .* add the defense .* "withhold"'):
        train(parse_training(raw, "small"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
