"""Building models from names and from the user's own factories, and weights from files."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keyhole.core.registry import MODELS
from keyhole.errors import ConfigError, ModelError, UnknownName
from keyhole.zoo import models as zoo
from keyhole.zoo.models import build_model, load_state

torch.set_num_threads(1)

SMALL: dict[str, dict[str, Any]] = {"resnet18": {"width": 4}, "mlp": {"hidden": 16}, "convnet": {"width": 4}}
"""Options that make a network small, where its own size would take long."""
LARGE = {"mcnn": (1, 32, 32), "scnn": (1, 32, 32)}
"""The smallest images of networks that need larger ones than the tests have."""
NAMES = [card.name for card in MODELS]


def build(
    name: str, shape: tuple[int, ...] = (3, 32, 32), classes: int = 10, seed: int = 0, **options: Any
) -> nn.Module:
    return build_model(name, input_shape=shape, num_classes=classes, options=options, seed=seed)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Requests


@pytest.mark.parametrize(
    ("name", "shape", "options", "error", "said"),
    [
        ("convnet", (1, 8, 8), {}, ModelError, r"\(1, 8, 8\).*at least 9 pixels"),
        ("convnet", (3, 32, 32), {"width": 0}, ConfigError, "model.width is 0"),
        ("mlp", (3, 32, 32), {"hiden": 4}, UnknownName, "'hiden' in model 'mlp'; did you mean 'hidden'"),
        ("lenet", (3, 32, 32), {}, UnknownName, "model 'lenet'; did you mean 'lenet_zhu'"),
        ("convnet", (3, 32, 32), {"width": 2.5}, ModelError, "called with .*width=2.5.* failed"),
    ],
)
def test_wrong_requests(name: str, shape: tuple[int, ...], options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build(name, shape, **options)


# Seeds


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_model_and_leaves_the_global_state_alone(name: str) -> None:
    state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    first = build(name, LARGE.get(name, (1, 12, 12)), seed=1, **SMALL.get(name, {})).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
    torch.rand(3)
    again = build(name, LARGE.get(name, (1, 12, 12)), seed=1, **SMALL.get(name, {})).state_dict()
    other = build(name, LARGE.get(name, (1, 12, 12)), seed=2, **SMALL.get(name, {})).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_global_state_survives_a_failure() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ModelError):
        build("convnet", (1, 8, 8))
    assert torch.equal(state, torch.get_rng_state())


# The user's own

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_classes, hidden=3):
        super().__init__()
        inputs = input_shape[0] * 16
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.Linear(hidden, num_classes))

    def forward(self, x):
        return self.out(x)

class nested:
    make = Net

def plain():
    return nn.Linear(2, 2)

def classes_only(num_classes, *, bias=True):
    return nn.Linear(4, num_classes, bias=bias)

def keywords(**kwargs):
    assert set(kwargs) == {"x"}, kwargs
    return nn.Linear(kwargs["x"], 2)

def reseeds():
    torch.manual_seed(0)
    return nn.Linear(2, 2)

def broken():
    raise RuntimeError("no weights today\\nsecond line")

def leaves():
    raise SystemExit(3)

def not_a_model():
    return 5

instance = nn.Linear(2, 2)
number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the user's modules, which is the current one."""
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text("from own_models import plain\n")
    (tmp_path / "own_syntax.py").write_text("def f(:\n")
    (tmp_path / "own_import.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "own_exit.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_own_factories(own: Path) -> None:
    path, state = list(sys.path), torch.get_rng_state()
    assert head_size(build("own_models:Net", (2, 4, 4), 7)) == 7
    assert count(build("own_models:nested.make", (2, 4, 4), 7, hidden=1)) == 33 + 14
    assert head_size(build("own_package.nets:plain")) == 2
    assert head_size(build("own_models:classes_only", classes=6)) == 6
    assert count(build("own_models:classes_only", classes=6, bias=False)) == 24
    assert head_size(build("own_models:classes_only", classes=6, num_classes=5)) == 5
    assert count(build("own_models:keywords", x=3)) == 8
    build("own_models:reseeds")
    assert sys.path == path and torch.equal(state, torch.get_rng_state())
    a, b = (build("own_models:plain", seed=seed).state_dict()["weight"] for seed in (1, 1))
    assert torch.equal(a, b)


def head_size(model: nn.Module) -> int:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("own_nothing:f", "'own_nothing' cannot be imported.*ModuleNotFoundError"),
        ("own_import:f", "a_package_that_is_not_there"),
        ("own_syntax:f", "SyntaxError"),
        ("own_exit:f", "SystemExit"),
        ("own_models:nothing", "has no 'nothing'"),
        ("own_models:nested.nothing", "has no 'nested.nothing'"),
        ("own_models:number", "is a int; a function"),
        ("own_models:instance", "is a Linear; a function"),
        ("own_models:not_a_model", "returned a int; a torch.nn.Module"),
        ("own_models:broken", "RuntimeError: no weights today"),
        ("own_models:leaves", "SystemExit"),
        ("own_models:Net:x", "not of the form"),
        (":f", "not of the form"),
        ("own_models:", "not of the form"),
        ("../own_models.py:plain", "not of the form"),
    ],
)
def test_own_factories_that_fail(own: Path, path: str, said: str) -> None:
    before = list(sys.path)
    with pytest.raises(ModelError, match=said) as error:
        build(path)
    assert path in str(error.value) and "\n" not in str(error.value)
    assert sys.path == before


def test_own_factory_with_a_wrong_option(own: Path) -> None:
    with pytest.raises(ModelError, match="hiden=2.*TypeError"):
        build("own_models:Net", (2, 4, 4), hiden=2)


# Weights from files


def saved(path: Path, model: nn.Module, **changes: Tensor | None) -> Path:
    """The model's weights in a file, with some of them replaced, or left out where the change is `None`."""
    tensors = {**model.state_dict(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_weights_round_trip(tmp_path: Path, name: str) -> None:
    trained, fresh = (
        build(name, LARGE.get(name, (1, 12, 12)), seed=1, **SMALL.get(name, {})),
        build(name, LARGE.get(name, (1, 12, 12)), seed=2, **SMALL.get(name, {})),
    )
    path = saved(tmp_path / "w.safetensors", trained)
    load_state(fresh, path)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in load_file(path).items())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    model = build("mlp", (1, 4, 4), hidden=3, layers=1)
    half = {key: value.half() for key, value in model.state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    load_state(model, tmp_path / "w.safetensors")
    assert model.state_dict()["head.bias"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head__bias": None}, "lacks 'head.bias'"),
        ({"head__bias": None, "head__weight": None}, "lacks 'head.bias' and 1 more"),
        ({"extra": torch.zeros(1)}, "has 'extra', which the model has not"),
        ({"head__bias": torch.zeros(11)}, r"'head.bias' has shape \(11,\), but the model needs \(10,\)"),
        ({"head__bias": torch.full((10,), float("nan"))}, "'head.bias' holds NaN or infinity"),
        ({"head__bias": torch.full((10,), float("inf"))}, "'head.bias' holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, changes: Any, said: str) -> None:
    model = build("mlp", (1, 4, 4), hidden=3, layers=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = saved(tmp_path / "w.safetensors", build("mlp", (1, 4, 4), seed=5, hidden=3, layers=1), **changes)
    with pytest.raises(ModelError, match=said):
        load_state(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_cut_off_file(tmp_path: Path, keep: int) -> None:
    model = build("mlp", (1, 4, 4), hidden=3, layers=1)
    path = saved(tmp_path / "w.safetensors", model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="w.safetensors' is not a safetensors file, or is cut off"):
        load_state(model, path)


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    model = build("mlp", (1, 4, 4), hidden=3, layers=1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="Pickles .* are never loaded"):
        load_state(model, tmp_path / "w.pt")
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ModelError, match="does not exist"):
            load_state(model, path)


def test_no_pickle_in_the_source() -> None:
    files = sorted(Path(str(zoo.__file__)).parent.glob("*.py"))
    assert Path(str(zoo.__file__)) in files
    for source in (file.read_text() for file in files):
        assert "import pickle" not in source and "torch.load(" not in source
