"""Model inversion from training file to scored images: files, resume, what attacks cannot reach, and bad input."""

from __future__ import annotations

import gc
import json
import math
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import tomli_w
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from keyhole.cli import _Bars, main
from keyhole.core.inversion import Target
from keyhole.core.told import silent
from keyhole.experiment import inversion_attacker, inversion_judge
from keyhole.experiment.inversion_attacker import Attacker
from keyhole.experiment.inversion_judge import ATTACK, CONTROLS, Inversions, Judge, train_evaluator
from keyhole.experiment.invert import global_networks, invert_rounds, public_images
from keyhole.experiment.train import Problem
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.inversion import gan_training
from keyhole.inversion.gmi import GMI
from keyhole.report.inversion import write_inversions
from keyhole.zoo.models import build_model

GMI_OPTIONS: dict[str, Any] = {"name": "gmi", "steps": 3, "gan_steps": 10, "gan_width": 2, "gan_batch": 8}
KED_OPTIONS: dict[str, Any] = {
    "name": "ked_mi", "steps": 3, "gan_steps": 5, "gan_width": 2, "gan_batch": 8, "gan_kernels": 2, "gan_kernel_size": 2
}  # fmt: skip
ROUNDS, SEEDS, CLASSES, SAMPLES = [1, 2], [0], 2, 2
CPU = torch.device("cpu")


def raw(**invert: Any) -> dict[str, Any]:
    """Two private digits, two public ones, small networks: seconds."""
    return {
        "title": "tiny",
        "data": {
            "name": "digits", "classes": [0, 1], "size": 32, "target": 4, "tune": 0, "public": 4, "candidates": 0,
            "test": 20, "train": 40,
        },
        "model": {"name": "mcnn", "width": 2},
        "federation": {"clients": 2, "rounds": 2, "batch_size": 16, "lr": 0.05},
        "invert": {
            "rounds": ROUNDS, "samples": SAMPLES, "public": [{"classes": [5, 6], "limit": 24}],
            "evaluator": {"name": "scnn", "epochs": 1}, "attacks": [GMI_OPTIONS], **invert,
        },
    }  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """The file with another value at a path such as ``invert.public``; `None` removes the key."""
    whole = raw()
    *above, last = path.split(".")
    place = whole
    for name in above:
        place = place[name]
    place[last] = value
    if value is None:
        del place[last]
    return whole


def plan_of(**invert: Any) -> TrainingPlan:
    return parse_training(raw(**invert))


def run(*arguments: str) -> int:
    """The command line, and its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["keyhole", *arguments])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)


def cells_in(folder: Path) -> dict[str, Path]:
    """Files of images by their path in the folder."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.glob("inversions/*/*/*.safetensors"))}


def images_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    # Cloned, as a test may write over a file that would still be mapped.
    return {
        name: {kind: tensor.clone() for kind, tensor in load_file(path).items()}
        for name, path in cells_in(folder).items()
    }


def assert_equal(one: dict[str, dict[str, Tensor]], two: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == two.keys() and one
    for name, tensors in one.items():
        assert tensors.keys() == two[name].keys()
        assert all(torch.equal(tensor, two[name][kind]) for kind, tensor in tensors.items()), name


def report_of(found: Inversions, folder: Path) -> dict[str, Any]:
    """The report's content, but for times, which differ from run to run."""
    write_inversions(found, folder)
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for row in content["rows"]:
        for name in ("seconds", "prior_seconds"):
            del row[name]
    return content


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, with a cache that belongs to these tests."""
    folder = tmp_path_factory.mktemp("invert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYHOLE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def whole(base: Path) -> tuple[TrainingPlan, Path, Inversions]:
    """Two networks, undefended and under a defense that changes the network, attacked by both methods."""
    given = raw(attacks=[GMI_OPTIONS, KED_OPTIONS])
    given["run"] = {"seeds": SEEDS}
    given["defenses"] = [{"chain": [{"name": "mid", "beta": 0.01}]}]
    plan = parse_training(given)
    return plan, base / "whole", invert_rounds(plan, base / "whole")


@pytest.fixture
def small(base: Path, tmp_path: Path) -> tuple[TrainingPlan, Path]:
    """GMI on two rounds of one network, done before; the folder is the test's own."""
    plan = plan_of()
    if not (base / "small").exists():
        invert_rounds(plan, base / "small")
    shutil.copytree(base / "small", tmp_path / "out")
    return plan, tmp_path / "out"


# What comes out


def test_every_attack_comes_with_its_controls(whole: tuple[TrainingPlan, Path, Inversions]) -> None:
    plan, _, found = whole
    cells = len(plan.defenses) * len(SEEDS) * 2 * len(ROUNDS)
    by_attacker = {name: [row for row in found.rows if row.attacker == name] for name in (ATTACK, *CONTROLS)}
    assert {name: len(rows) for name, rows in by_attacker.items()} == dict.fromkeys(by_attacker, cells)
    assert len(found.rows) == 6 * cells
    for row in found.rows:
        assert row.scores is not None and row.images == CLASSES * SAMPLES and len(row.scores.top1) == CLASSES
        assert 0 <= row.accuracy <= 1
    assert found.classes == CLASSES and found.evaluator_classes == CLASSES + 2 and found.public == 24
    assert len(found.trained) == len(plan.defenses) * len(SEEDS)
    for row in by_attacker[ATTACK]:
        images = found.pictures[row.defense, row.seed, row.round, row.attack, ATTACK]
        assert images.shape == (CLASSES, SAMPLES, 1, 32, 32)
        assert images.min() >= 0 and images.max() <= 1
        assert row.seconds > 0 and row.prior_seconds > 0


def test_a_control_has_the_numbers_of_what_it_is(whole: tuple[TrainingPlan, Path, Inversions]) -> None:
    plan, folder, found = whole
    rows = {(r.defense, r.seed, r.round, r.attack, r.attacker): r for r in found.rows}
    trained = {(plan.defenses.index(run.defense), run.seed): run for run in found.trained}
    for (index, seed, number, spec, attacker), row in rows.items():
        attack = rows[index, seed, number, spec, ATTACK]
        other = rows[index, seed, 3 - number, spec, ATTACK]
        if attacker == "control:untrained":
            assert row.accuracy == trained[index, seed].rounds[0].accuracy
            assert row.seconds != attack.seconds
        else:
            assert row.accuracy == trained[index, seed].rounds[number].accuracy
        if attacker == "control:other_round":
            # Another round's images as they are, but judged by this round's network too.
            assert row.scores == other.scores and math.isnan(row.seconds)
            images = found.pictures[index, seed, 3 - number, spec, ATTACK]
            target = target_of(plan, folder, index, seed, number)
            right = [float((target.logits(images[c]).argmax(-1) == c).double().mean()) for c in range(CLASSES)]
            assert row.target_accuracy == pytest.approx(sum(right) / CLASSES)
        if attacker == "control:random_labels":
            assert attack.scores is not None and row.scores is not None
            assert row.scores.fid == pytest.approx(attack.scores.fid, rel=1e-4)
    assert len({r.scores.fid for r in found.rows if r.scores and r.attacker == "control:private_images"}) == 1


def target_of(plan: TrainingPlan, folder: Path, index: int, seed: int, number: int) -> Target:
    networks = global_networks(plan, Problem(plan, CPU), folder)
    (network,) = (one for one in networks if (one.defense, one.seed, one.round) == (index, seed, number))
    return network.target(CPU)


def test_a_changed_network_is_attacked_as_it_is(whole: tuple[TrainingPlan, Path, Inversions]) -> None:
    plan, folder, _ = whole
    target = target_of(plan, folder, 1, 0, 2)
    assert any("encode" in name for name in target.weights.params)
    assert not target.task.noises and target.logits(torch.rand(3, 1, 32, 32)).shape == (3, CLASSES)


def test_files_are_for_their_owner_alone(whole: tuple[TrainingPlan, Path, Inversions]) -> None:
    _, folder, found = whole
    write_inversions(found, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("inversions/**/seed-*")} == {0o700}
    assert not list(folder.rglob("*.partial"))


def test_equal_runs_give_equal_images(
    small: tuple[TrainingPlan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with nothing left of the first one."""
    plan, folder = small
    monkeypatch.setenv("KEYHOLE_CACHE", str(tmp_path / "another cache"))
    invert_rounds(plan, tmp_path / "again")
    assert_equal(images_in(folder), images_in(tmp_path / "again"))


# Resume


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made from here on: cells, rounds and steps of GANs."""
    calls: list[str] = []
    search, descend, rounds = inversion_attacker.invert, gan_training._Training._descend, Problem.train

    def spy_search(*given: Any, **more: Any) -> Any:
        calls.append("cell")
        return search(*given, **more)

    def spy_descend(self: Any, *given: Any) -> Any:
        calls.append("gan")
        return descend(self, *given)

    def spy_train(self: Any, run: Any, told: Any, *given: Any) -> Any:
        def heard(what: str, fraction: float) -> None:
            calls.append("round")

        return rounds(self, run, heard, *given)

    monkeypatch.setattr(inversion_attacker, "invert", spy_search)
    monkeypatch.setattr(gan_training._Training, "_descend", spy_descend)
    monkeypatch.setattr(Problem, "train", spy_train)
    return calls


def test_only_what_is_missing_is_made_again(small: tuple[TrainingPlan, Path], made: list[str]) -> None:
    plan, folder = small
    before, first = images_in(folder), report_of(invert_rounds(plan, folder), folder)
    assert made == []
    list(cells_in(folder).values())[0].unlink()
    again = invert_rounds(plan, folder)
    assert made == ["cell"]
    assert report_of(again, folder) == first
    assert_equal(images_in(folder), before)


@pytest.mark.parametrize("damage", [b"", b"no tensors at all", None])
def test_a_damaged_cell_is_made_again(small: tuple[TrainingPlan, Path], made: list[str], damage: bytes | None) -> None:
    plan, folder = small
    before = images_in(folder)
    path = list(cells_in(folder).values())[1]
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    invert_rounds(plan, folder)
    assert made == ["cell"]
    assert_equal(images_in(folder), before)


def test_a_training_of_the_same_folder_is_used(base: Path, tmp_path: Path, made: list[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(raw(seed=5)))
    assert run("train", str(path), "--out", str(tmp_path / "out")) == 0
    assert made == ["round", "round"]
    made.clear()
    assert run("invert", str(path), "--out", str(tmp_path / "out")) == 0
    assert "round" not in made and made.count("cell") == 3
    assert {p.name for p in tmp_path.glob("out/*.*")} >= {"train.json", "report.json", "report.md", "report.html"}


def test_an_interrupted_gan_goes_on_after_its_last_checkpoint(
    small: tuple[TrainingPlan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], made: list[str],
) -> None:  # fmt: skip
    _, folder = small
    path, cache = tmp_path / "tiny.toml", tmp_path / "cache"
    path.write_text(tomli_w.dumps(raw()))
    monkeypatch.setenv("KEYHOLE_CACHE", str(cache))
    monkeypatch.setattr(gan_training, "CHECKPOINT_STEPS", 4)
    shown = _Bars.training

    def stop(self: _Bars, what: str, fraction: float) -> None:
        if what == "GAN" and fraction > 0.65:
            raise KeyboardInterrupt
        shown(self, what, fraction)

    with monkeypatch.context() as patch:
        patch.setattr(_Bars, "training", stop)
        assert run("invert", str(path), "--out", str(tmp_path / "cut")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not cells_in(tmp_path / "cut")
    (kept,) = cache.glob("gan-*.safetensors")
    with safe_open(str(kept), framework="pt") as file:
        assert json.loads(file.metadata()["account"])["step"] == 4
    made.clear()
    assert run("invert", str(path), "--out", str(tmp_path / "cut")) == 0
    assert made.count("gan") == 6 + 2  # steps 5 to 10 of the critic, two of the generator
    assert_equal(images_in(tmp_path / "cut"), images_in(folder))


# What an attack cannot reach


def attacker_of(plan: TrainingPlan, problem: Problem, folder: Path) -> Attacker:
    assert plan.invert is not None
    settings = plan.invert.settings
    public = torch.cat([pool.images for pool in public_images(plan, problem.data.image_shape)])
    networks = global_networks(plan, problem, folder)
    return Attacker(networks, public, plan.invert.attacks, settings.samples, settings.seed, silent)


def refused(*given: Any, **more: Any) -> Any:
    raise AssertionError("an attack reached what it must not have")


def test_images_do_not_depend_on_what_is_private(
    whole: tuple[TrainingPlan, Path, Inversions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is private becomes NaN once the networks are trained, and nothing that judges can be had."""
    plan, folder, _ = whole
    shutil.copytree(folder, tmp_path / "blind", ignore=shutil.ignore_patterns("inversions"))
    monkeypatch.setenv("KEYHOLE_CACHE", str(tmp_path / "cache"))
    problem = Problem(plan, CPU)
    attacker = attacker_of(plan, problem, tmp_path / "blind")
    for tensor in private_of(problem):
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    for name in ("Judge", "train_evaluator", "score", "score_as_others", "trained_state", "accuracy"):
        monkeypatch.setattr(inversion_judge, name, refused)
    attacker.attack()
    assert_equal(images_in(tmp_path / "blind"), images_in(folder))


def private_of(problem: Problem) -> list[Tensor]:
    """All private images and labels."""
    data = problem.data
    pools = (data.target, data.tune, data.train, data.candidates, data.public)
    return [
        problem.inputs, problem.labels, *problem.test, problem.public.inputs, problem.public.targets,
        *(tensor for pool in pools for tensor in (pool.images, pool.labels)),
    ]  # fmt: skip


def tensors_within(thing: Any) -> Iterator[Tensor]:
    """All tensors that can be reached from an object, by whatever way but through the globals of its code."""
    seen, left = set[int](), [thing]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, FunctionType):
            left += [*(one.__closure__ or ()), *(one.__defaults__ or ())]
        else:
            left += gc.get_referents(one)


@pytest.mark.parametrize("weights", [None, "file"])
def test_nothing_private_can_be_reached_from_an_attacker(
    whole: tuple[TrainingPlan, Path, Inversions], own: Callable[..., dict[str, Any]], weights: str | None
) -> None:
    plan, folder, _ = whole
    plan = plan if weights is None else parse_training(own())
    problem = Problem(plan, CPU)
    private = {tensor.untyped_storage().data_ptr() for tensor in private_of(problem) if tensor.numel()}

    def reached(thing: Any) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors_within(thing)} & private

    attacker = attacker_of(plan, problem, folder)
    assert reached(problem) == private  # so the search finds what there is
    assert any(tensor is attacker.public for tensor in tensors_within(attacker))
    assert reached(attacker) == set()


def test_an_attack_is_given_a_network_and_public_pixels(
    small: tuple[TrainingPlan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = small
    for path in cells_in(folder).values():
        path.unlink()
    seen: list[tuple[Any, ...]] = []
    prepare = GMI.prepare

    def spy(self: GMI, *given: Any, **more: Any) -> Any:
        seen.append((*given, *more.values()))
        return prepare(self, *given, **more)

    monkeypatch.setattr(GMI, "prepare", spy)
    attacker = attacker_of(plan, Problem(plan, CPU), folder)
    attacker.attack()
    assert len(seen) == 3
    for target, public, key, place, _ in seen:
        assert [field.name for field in fields(target)] == ["task", "weights"]
        assert public is attacker.public and public.shape == (24, 1, 32, 32)
        assert key.numel() == 2 and place._fields == ("folder", "told") and place.folder is None


def test_the_judge_is_made_after_the_last_image(
    small: tuple[TrainingPlan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = small
    for path in cells_in(folder).values():
        path.unlink()
    made, there = Judge.__init__, []

    def spy(self: Judge, *given: Any) -> None:
        there.append(len(cells_in(folder)))
        made(self, *given)

    monkeypatch.setattr(Judge, "__init__", spy)
    monkeypatch.setattr(inversion_judge, "trained_state", after(inversion_judge.trained_state, there))
    invert_rounds(plan, folder)
    assert there == [3, "evaluator"]


def after(function: Callable[..., Any], there: list[Any]) -> Callable[..., Any]:
    """The function, noting that it was called."""

    def noting(*given: Any, **more: Any) -> Any:
        there.append("evaluator")
        return function(*given, **more)

    return noting


# Other networks


FACTORY = """
from torch import nn

def make(input_shape, num_classes, width=3):
    return nn.Sequential(
        nn.Conv2d(input_shape[0], width, 5, stride=4), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 7 * 7, num_classes),
    )

def three(input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 3))
"""


@pytest.fixture
def own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A user's folder with a model of its own and weights of two seeds; gives the training file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_model.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "their_model", raising=False)
    for seed in (0, 1):
        path = tmp_path / f"seed{seed}-round007.safetensors"
        model = build_model("their_model:make", input_shape=(1, 32, 32), num_classes=2, options={}, seed=10 + seed)
        save_file(model.state_dict(), path)

    def file(**invert: Any) -> dict[str, Any]:
        given = raw(**{"weights": "seed{seed}-round{round:03}.safetensors", "rounds": [7], **invert})
        given["model"] = {"factory": "their_model:make"}
        given["run"] = {"seeds": [0, 1]}
        del given["federation"]
        return given

    return file


def test_a_users_own_network_is_attacked(own: Callable[..., dict[str, Any]], tmp_path: Path, made: list[str]) -> None:
    plan = parse_training(own())
    found = invert_rounds(plan, tmp_path / "out")
    assert found.trained == [] and "round" not in made
    assert {(row.seed, row.round) for row in found.rows} == {(0, 7), (1, 7)}
    assert {row.attacker for row in found.rows} == {ATTACK, *CONTROLS} - {"control:other_round"}
    target = target_of(plan, tmp_path / "out", 0, 1, 7)
    wanted = load_file(tmp_path / "seed1-round007.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in target.weights.params.items())
    assert "weights from a file" in report_of(found, tmp_path / "out")["assumptions"][0]
    # Another network under the same name is another target.
    made.clear()
    save_file(load_file(tmp_path / "seed0-round007.safetensors"), tmp_path / "seed1-round007.safetensors")
    again = invert_rounds(plan, tmp_path / "out")
    assert made == ["cell"]
    (one, two) = (picture(again, seed) for seed in (0, 1))
    assert one.shape == two.shape and not torch.equal(two, picture(found, 1))


def picture(found: Inversions, seed: int) -> Tensor:
    (images,) = (value for key, value in found.pictures.items() if key[1] == seed and key[4] == ATTACK)
    return images


@pytest.mark.parametrize(
    "link", [{"name": "bido"}, {"name": "neg_label_smoothing"}, {"name": "mid", "eval_mean": False}]
)
def test_a_network_trained_under_a_defense_is_attacked(base: Path, tmp_path: Path, link: dict[str, Any]) -> None:
    given = raw(rounds=[1], controls=False, images=False)
    given["federation"]["rounds"] = 1
    given["defenses"] = [{"chain": [link]}]
    found = invert_rounds(parse_training(given), tmp_path / "out")
    assert [(row.defense, row.attacker) for row in found.rows] == [(0, ATTACK), (1, ATTACK)]
    assert all(row.scores is not None for row in found.rows) and found.private is None
    bare, defended = (found.pictures[index, 0, 1, found.rows[0].attack, ATTACK] for index in (0, 1))
    assert not torch.equal(bare, defended)


def test_a_search_that_explodes_is_a_row_that_says_so(base: Path, tmp_path: Path, made: list[str]) -> None:
    plan = plan_of(rounds=[1, 2], attacks=[{**GMI_OPTIONS, "weight": 1e38, "lr": 1e38}])
    found = invert_rounds(plan, tmp_path / "out")
    assert {row.attacker for row in found.rows} == {ATTACK, "control:untrained"}
    assert all(row.scores is None and "lower its lr" in row.detail for row in found.rows)
    content = report_of(found, tmp_path / "out")
    assert "No attack came to an end" in content["verdict"]
    assert all(row["networks"] == 0 and row["attack_accuracy"]["value"] is None for row in content["rows"])


def test_a_gan_that_diverges_on_a_network_is_a_row_too(base: Path, tmp_path: Path) -> None:
    diverges = {**KED_OPTIONS, "gan_lr": 1e18}
    found = invert_rounds(plan_of(rounds=[2], attacks=[GMI_OPTIONS, diverges]), tmp_path / "out")
    failed = [row for row in found.rows if row.scores is None]
    assert {row.attack.name for row in failed} == {"ked_mi"} and "the GAN diverged" in failed[0].detail
    assert any(row.scores is not None for row in found.rows if row.attack.name == "gmi")


def test_a_gan_that_diverges_for_all_ends_the_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(raw(attacks=[{**GMI_OPTIONS, "gan_lr": 1e18}])))
    assert run("invert", str(path), "--out", str(tmp_path / "out")) == 2
    assert "the GAN diverged at step" in capsys.readouterr().err


def test_updates_and_networks_share_a_report(base: Path, tmp_path: Path) -> None:
    given = raw(controls=False)
    given["model"]["batchnorm"] = "eval"
    given["audit"] = {
        "rounds": [0, 2], "attacks": [{"name": "idlg", "steps": 2}], "run": {"samples": 1},
    }  # fmt: skip
    path = tmp_path / "both.toml"
    path.write_text(tomli_w.dumps(given))
    assert run("invert", str(path), "--out", str(tmp_path / "out"), "--jobs", "1") == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = content["both"]
    assert [(row["defense"], row["round"]) for row in rows] == [("none", "0"), ("none", "1"), ("none", "2")]
    assert [row["images leaked by an update"] == "\u2013" for row in rows] == [False, True, False]
    assert [row["classes recognised from the network"] == "\u2013" for row in rows] == [True, False, False]
    assert "Update and network" in (tmp_path / "out" / "report.md").read_text()
    assert "What an update reveals" in (tmp_path / "out" / "report.html").read_text()


# Bad input


LENET = {"model": {"name": "lenet_zhu"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (changed("invert", None), "no [invert] section"),
        (changed("invert.attacks", [{"name": "gmy"}]), "unknown inversion 'gmy' in [[invert.attacks]] number 1; did"),
        (changed("invert.attacks", [{"name": "idlg"}]), "'idlg', which attacks updates: it belongs to [[attacks]]"),
        (changed("invert.attacks", [{**GMI_OPTIONS, "stepz": 3}]), "unknown option 'stepz'"),
        (changed("invert.attacks", [{**GMI_OPTIONS, "steps": 0}]), "steps is 0; it must be at least 1"),
        (changed("invert.attacks", [GMI_OPTIONS, GMI_OPTIONS]), "names one attack twice"),
        (changed("invert.attacks", None), "[invert] names no attack"),
        (changed("invert.public", None), "[invert] has no public images"),
        (changed("invert.public", [{"classes": [1, 5]}]), "has the private classes [1]"),
        (changed("invert.public", [{}]), "is the private data set 'digits' itself"),
        (changed("invert.public", [{"classes": []}]), "at least one"),
        (changed("invert.public", [{"classes": [5, 77]}]), "different numbers from 0 to 9"),
        (changed("invert.public", [{"name": "digit"}]), "did you mean 'digits'?"),
        (changed("invert.public", [{"classes": [5, 6], "limit": 7}]), "'gmi': there are 7 public images, fewer than"),
        (changed("data.size", None), "needs images (channels, height, width) with sides of at least 32 pixels"),
        (changed("data.size", 28) | LENET, "'gmi': the public images are 1x28x28; a GAN needs 32x32 or 64x64"),
        (changed("invert.rounds", [1, 3]), "a rising list of rounds from 0 (untrained) to 2 (federation.rounds)"),
        (changed("invert.rounds", [2, 1]), "a rising list"),
        (changed("invert.rounds", []), "a rising list"),
        (changed("invert.rounds", [-1]), "a rising list"),
        (changed("invert.samples", 0), "invert.samples"),
        (changed("invert.sample", 3), "did you mean 'samples'?"),
        (changed("invert.evaluator", {"name": "mcnn"}), "the attacked network's own architecture"),
        (changed("invert.evaluator", {"name": "snn"}), "did you mean"),
        (changed("invert.evaluator", {"widht": 3}), "did you mean 'width'?"),
        (changed("invert.weights", "nowhere.safetensors"), "same file for several seeds or rounds"),
        (changed("invert.weights", "nowhere-{round}.safetensors"), "'nowhere-1.safetensors' does not exist"),
        (changed("invert.weights", "nowhere-{defense}.safetensors"), "only {seed} and {round} may stand in braces"),
        (changed("data.train", 1) | {"run": {"seeds": [0]}}, None),
        (changed("federation", None), "no [federation] section"),
        (changed("model", {"factory": "torch.nn:Flatten"}), "the model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any], said: str | None,
) -> None:  # fmt: skip
    if said is None:
        given, said = few_of_a_class(given), "show none of class 1"
    monkeypatch.setattr(gan_training._Training, "__init__", refused)
    monkeypatch.setattr(Problem, "train", refused)
    assert_refused("invert", given, said, tmp_path, capsys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def pickle_it(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def other_classes(path: Path) -> None:
    model = build_model("their_model:make", input_shape=(1, 32, 32), num_classes=5, options={}, seed=0)
    save_file(model.state_dict(), path)


def other_width(path: Path) -> None:
    model = build_model("their_model:make", input_shape=(1, 32, 32), num_classes=2, options={"width": 4}, seed=0)
    save_file(model.state_dict(), path)


def not_finite(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["4.bias"].fill_(math.nan)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncate, "is not a safetensors file, or is cut off"),
        (pickle_it, "Pickles (.pt, .pth) are never loaded"),
        (Path.unlink, "does not exist"),
        (other_classes, "'4.bias' has shape (5,), but the model needs (2,)"),
        (other_width, "has shape"),
        (not_finite, "holds NaN or infinity"),
    ],
)
def test_bad_weights_are_one_sentence(
    own: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    """Of the second network too, before any GAN is trained."""
    monkeypatch.setattr(gan_training._Training, "__init__", refused)
    change(tmp_path / "seed1-round007.safetensors")
    assert_refused("invert", own(), said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"defenses": [{"chain": [{"name": "clip"}]}]}, "remove [[defenses]]"),
        ({"audit": {"attacks": [{"name": "idlg"}]}}, "[audit] attacks what is trained here"),
        ({"model": {"factory": "their_model:three"}}, "2"),
        ({"model": {"factory": "their_model:four"}}, "has no 'four'"),
    ],
)
def test_a_file_that_names_weights_says_how_they_fit(
    own: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any],
    said: str,
) -> None:  # fmt: skip
    assert_refused("invert", own() | changes, said, tmp_path, capsys)


def test_weights_from_files_need_their_round(
    own: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = own()
    del given["invert"]["rounds"]
    assert_refused("invert", given, "say so with invert.rounds", tmp_path, capsys)


def test_attacks_belong_to_their_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = {"data": {"name": "digits"}, "model": {"name": "lenet_zhu"}, "attacks": [{"name": "gmi"}]}
    assert_refused("audit", audit, "'gmi', which attacks the network itself: it belongs to", tmp_path, capsys)
    assert run("audit", "fedinverse", "--out", str(tmp_path / "out")) == 2
    assert "a preset of keyhole train, frontier and invert" in capsys.readouterr().err


def test_public_images_of_another_kind_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pytest.importorskip("PIL.Image")
    for name in ("cats", "dogs"):
        (tmp_path / "colour" / name).mkdir(parents=True)
        for number in range(4):
            images.new("RGB", (40, 32), (number, 9, 200)).save(tmp_path / "colour" / name / f"{number}.png")
    given = changed("invert.public", [{"name": str(tmp_path / "colour")}])
    assert_refused("invert", given, "have 3 channels and the private ones 1", tmp_path, capsys)


def test_private_images_under_another_name_are_found(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pictures in two folders: names and classes tell nothing."""
    images = pytest.importorskip("PIL.Image")
    for folder in ("mine", "theirs"):
        for name in ("a", "b"):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(12):
                shown = number + 100 * (name == "b") + 50 * (folder == "theirs") * (number > 0)
                images.new("L", (32, 32), shown).save(tmp_path / folder / name / f"{number}.png")
    given = changed("invert.public", [{"name": str(tmp_path / "theirs")}])
    given["data"] = {
        "name": str(tmp_path / "mine"), "target": 2, "tune": 0, "public": 1, "candidates": 0, "test": 8
    }  # fmt: skip
    assert_refused("invert", given, "2 of the 24 public images are private ones too", tmp_path, capsys)


def test_two_splits_of_one_set_share_their_classes(base: Path) -> None:
    """The judge must not tell a class of one section from the same class of another."""
    plan = plan_of(public=[{"classes": [5, 6], "limit": 12}, {"classes": [6, 7], "limit": 12, "seed": 1}])
    assert plan.invert is not None
    problem = Problem(plan, CPU)
    pools = public_images(plan, problem.data.image_shape)
    seen: list[Tensor] = []

    def spy(task: Any, weights: Any, images: Tensor, labels: Tensor, *given: Any) -> Any:
        seen.append(labels)
        return weights, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion_judge, "trained_state", spy)
        _, _, count = train_evaluator(plan.invert, problem, pools, silent)
    own = torch.cat([pool.labels for pool in pools])
    assert sorted(set(own.tolist())) == [5, 6, 7] and count == 2 + 3
    assert torch.equal(seen[0][-24:], own - 5 + 2) and int(seen[0][:-24].max()) == 1


def test_a_head_that_does_not_fit_leaves_no_folder(
    own: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("train", "invert"):
        assert_refused(verb, raw() | {"model": {"factory": "their_model:three"}}, "2", tmp_path, capsys)


def assert_refused(
    verb: str, given: dict[str, Any], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "bad.toml"
    path.write_text(tomli_w.dumps(given))
    assert run(verb, str(path), "--out", str(folder / "out")) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("Error: ") and error.count("\n") == 1, error
    assert not (folder / "out").exists()


def few_of_a_class(given: dict[str, Any]) -> dict[str, Any]:
    """Two private training images, which are of one class in the pool of that seed."""
    for seed in range(100):
        given["data"] |= {"target": 1, "train": 1, "seed": seed}
        labels = Problem(parse_training(given), torch.device("cpu")).labels
        if labels.tolist() == [0, 0]:
            return given
    raise AssertionError("every seed has both classes")
