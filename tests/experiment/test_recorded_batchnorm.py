"""Batch statistics worked out from running statistics, checked against those that hooks saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_case import LR, keep, moved, record
from torch import Tensor, nn

from keyhole.errors import ConfigError
from keyhole.experiment.recorded import audit_transcript
from keyhole.experiment.recorded_work import Finding
from keyhole.report.recorded import leaks

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 3])
BRIEF = 'attacks=[{name="inverting_gradients",steps=3,restarts=1,statistics=1.0}]'


class Normed(nn.Module):
    """Two BatchNorm layers, over maps and over features."""

    input_shape = (1, 8, 8)
    momentum: float | None = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.maps = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=self.momentum)
        self.features, self.head = nn.BatchNorm1d(108, momentum=self.momentum), nn.Linear(108, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(torch.sigmoid(self.maps(self.conv(images))).flatten(1)))


class Wide(nn.Module):
    """Batch statistics of one image are 192 numbers of 64 pixels."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.maps, self.head = nn.Conv2d(1, 96, 7), nn.BatchNorm2d(96), nn.Linear(384, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.maps(self.conv(images))).flatten(1))


class Averaging(Normed):
    """Running statistics are means over all steps so far."""

    momentum = None


class Quick(Normed):
    momentum = 0.6


def trained(kind: type[Normed], steps_before: int = 2) -> Normed:
    """A network whose running statistics are not those it began with."""
    torch.manual_seed(3)
    model = kind()
    for number in range(steps_before):
        model(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(50 + number)))
    return model


def seen_by_hooks(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("maps", "features"):

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            over = [0, *range(2, args[0].dim())]
            found[f"{name}.mean"], found[f"{name}.var"] = args[0].mean(over), args[0].var(over, correction=0)

        model.get_submodule(name).register_forward_hook(hook)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(IMAGES)
    model.load_state_dict(before)
    return found


def audited(folder: Path, kind: type[Normed], *changes: str) -> Finding:
    (finding,) = audit_transcript(folder, f"{__name__}:{kind.__name__}", changes=(BRIEF, *changes)).found
    return finding


@pytest.mark.parametrize("kind", [Normed, Averaging, Quick])
def test_the_batchs_statistics_follow_from_the_running_ones(tmp_path: Path, kind: type[Normed]) -> None:
    model = trained(kind)
    expected = seen_by_hooks(model)
    folder = record(tmp_path, model, {"7": moved(model, [(IMAGES, LABELS)])}, {"7": 4}, lr=LR)
    shared = audited(folder, kind, 'batchnorm="train_shared"')
    assert shared.update.statistics is not None and shared.update.statistics.keys() == expected.keys()
    for name, value in shared.update.statistics.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name
    assert shared.training.words[-1] == "batch statistics of 2 layers of BatchNorm worked out from the running ones"
    hidden = audited(folder, kind, 'batchnorm="train_hidden"')
    assert hidden.update.statistics is None and "as batchnorm=train_hidden says" in hidden.training.words[-1]
    assert not torch.equal(shared.attempts[0].guesses, hidden.attempts[0].guesses)
    evaluating = audited(folder, kind, 'batchnorm="eval"')
    assert "batchnorm=train_shared fits better" in evaluating.training.words[-1]


def test_where_they_do_not_follow_the_report_says_so(tmp_path: Path) -> None:
    model = trained(Normed)
    update = moved(model, [(IMAGES, LABELS)])
    twice = moved(model, [(IMAGES, LABELS), (IMAGES, LABELS)])
    kept = {name: value * ("running" not in name) for name, value in update.items()}
    odd = {name: value * (100 if "running_var" in name else 1) for name, value in update.items()}
    bare = {name: value for name, value in update.items() if "running" not in name}
    cases: list[tuple[dict[str, Tensor], int, tuple[str, ...], str]] = [
        (twice, 2, (), "running statistics mix those of 2 steps"),
        (kept, 1, (), "running statistics came back as they were sent, or not at all"),
        (bare, 1, (), "running statistics came back as they were sent, or not at all"),
        (odd, 1, (), "running statistics moved otherwise than one step with the model's momentum moves them"),
        (update, 1, ("sum=true",), "a mean over clients mixes those of all"),
    ]
    for number, (sent, epochs, more, said) in enumerate(cases):
        updates = {"7": sent, "8": sent}
        folder = record(tmp_path / str(number), model, updates, {"7": 4, "8": 4}, lr=LR, epochs=epochs)
        finding = audited(folder, Normed, 'batchnorm="train_shared"', "most=1", *more)
        assert finding.update.statistics is None
        assert finding.training.words[-1] == f"the batch statistics of BatchNorm are not used: {said}"


def test_a_layer_that_was_frozen_is_left_out(tmp_path: Path) -> None:
    model = trained(Normed)
    update = moved(model, [(IMAGES, LABELS)])
    update |= {name: torch.zeros_like(value) for name, value in update.items() if "features.running" in name}
    finding = audited(record(tmp_path, model, {"7": update}, {"7": 4}, lr=LR), Normed, 'batchnorm="train_shared"')
    assert finding.update.statistics is not None and set(finding.update.statistics) == {"maps.mean", "maps.var"}
    assert finding.training.words[-1].startswith("batch statistics of 1 of 2 layers of BatchNorm")


def test_how_batchnorm_ran_is_asked_for_with_the_key_that_says_it(tmp_path: Path) -> None:
    model = trained(Normed)
    folder = record(tmp_path, model, {"7": moved(model, [(IMAGES, LABELS)])}, {"7": 4}, lr=LR)
    with pytest.raises(ConfigError, match="--set batchnorm=train_shared"):
        audited(folder, Normed)


def test_batch_statistics_alone_are_a_leak_as_the_control_does_without_them(tmp_path: Path) -> None:
    """The client sends noise for its parameters, so that nothing else tells of the image."""
    torch.manual_seed(1)
    model = Wide()
    model(torch.rand(16, 1, 8, 8))
    sent = moved(model, [(IMAGES[:1], LABELS[:1])])
    params = dict(model.named_parameters())
    sent |= {name: torch.randn(value.shape) * value.std() for name, value in sent.items() if name in params}
    folder = record(tmp_path / "t", model, {"7": sent}, {"7": 1}, lr=LR, epochs=1)
    secrets = keep(tmp_path / "s", "7", IMAGES[:1], LABELS[:1])
    brief = 'attacks=[{name="inverting_gradients",steps=150,restarts=1,tv=0.0,statistics=1000.0}]'
    findings = audit_transcript(folder, f"{__name__}:Wide", secrets, (brief, "batchnorm=train_shared"))
    (attempt,) = findings.found[0].attempts
    assert attempt.metrics["ssim"][0] > 0.9
    assert attempt.control["ssim"][0] < 0.3
    assert leaks(attempt) == [True]
    without = audit_transcript(folder, f"{__name__}:Wide", secrets, (brief, "batchnorm=train_hidden"))
    assert leaks(without.found[0].attempts[0]) == [False]
