"""Freshly made models, registered ones and the user's own by import path, and weights from files.

A model file is never unpickled: weights come from safetensors files, architectures from code the user names.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.core.keys import fold_in, new_key, seeded
from keyhole.core.registry import MODELS
from keyhole.errors import KeyholeError, ModelError, UnknownName, cause

_GIVEN = ("input_shape", "num_classes")
"""Arguments that Keyhole fills in; the rest are the user's options."""


def build_model(
    name_or_factory: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    options: dict[str, Any],
    seed: int,
) -> nn.Module:
    """A freshly initialised model, the same for the same seed; torch's global random state is left as it was.

    Args:
        name_or_factory: a registered name, or ``package.module:factory`` of the user's own code, which is
            imported with the current directory on the path. Such a factory gets ``input_shape`` and
            ``num_classes`` only where its signature names them, and never in place of an option of that name.
        input_shape: shape of one input, usually (c, h, w).
        num_classes: number of classes.
        options: the factory's other arguments.
        seed: which initial weights.

    Raises:
        ModelError: the factory cannot be imported, fails, or returns something else than a module.
        UnknownName: no such model, or a registered model has no such option.
    """
    given = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    with seeded(fold_in(new_key(seed), "model")):
        if ":" in name_or_factory:
            return _build_own(name_or_factory, given, options)
        card = MODELS.card(name_or_factory)
        accepted = [name for name in card.signature().parameters if name not in _GIVEN]
        for option in options:
            if option not in accepted:
                raise UnknownName("option", option, accepted, f"model '{name_or_factory}'")
        return _called(name_or_factory, card.factory, {**given, **options})


def _build_own(path: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    with _current_directory_first():
        factory = _import_factory(path)
        try:
            named = inspect.signature(factory).parameters
        except (TypeError, ValueError):  # some callables written in C do not tell
            named = {}  # type: ignore[assignment]
        offered = {name: value for name, value in given.items() if name in named}
        return _called(path, factory, {**offered, **options})


@contextmanager
def _current_directory_first() -> Iterator[None]:
    """As ``python -m`` does; a console script has its own folder on the path instead of the user's."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # imported code may have changed the path itself
            sys.path.remove(here)


def import_own(path: str, what: str) -> Any:
    """Something of the user's own code, imported with the current directory on the path.

    Args:
        path: ``package.module:name``.
        what: what it is, for errors.

    Raises:
        ModelError: there is no such thing, or its module cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ModelError(f"{what} '{path}' is not of the form 'package.module:name'.")
    try:
        with _current_directory_first():
            found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Only where the module itself is what is missing, not something that it imports in turn.
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        hint = f"; it is looked for in '{os.getcwd()}' first, so run the command in the folder of your code"
        raise ModelError(
            f"{what} '{path}': module '{module_name}' cannot be imported ({cause(error)}){hint if missing else ''}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ModelError(f"{what} '{path}': module '{module_name}' has no '{attribute}'.")
        found = getattr(found, part)
    return found


def _import_factory(path: str) -> Callable[..., Any]:
    found = import_own(path, "model factory")
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise ModelError(f"model factory '{path}' is a {kind}; a function (or class) that makes the model is needed.")
    made: Callable[..., Any] = found
    return made


def _called(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**arguments)
    except KeyholeError:
        raise
    except (Exception, SystemExit) as error:
        listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ModelError(f"model '{name}' called with ({listed}) failed ({cause(error)}).") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model factory '{name}' returned a {type(model).__name__}; a torch.nn.Module is needed.")
    return model


def load_state(model: nn.Module, path: Path) -> None:
    """Load weights and buffers from a safetensors file into ``model``, all of them or none.

    Args:
        model: changed in place; values are converted to the types of its own tensors.
        path: a file written by ``safetensors.torch.save_file(model.state_dict(), path)``.

    Raises:
        ModelError: the file cannot be read, or its names, shapes or values do not fit; the model is then
            unchanged.
    """
    loaded = _read_safetensors(Path(path))
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(loaded)), sorted(set(loaded) - set(expected))
    if missing:
        raise ModelError(f"weights file '{path}' lacks {_some(missing)}; it belongs to another model.")
    if unexpected:
        raise ModelError(
            f"weights file '{path}' has {_some(unexpected)}, which the model has not; it belongs to another model."
        )
    for name, tensor in loaded.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, but the model needs {tuple(expected[name].shape)}"
            raise ModelError(f"weights file '{path}': '{name}' has shape {shapes}.")
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"weights file '{path}': '{name}' holds NaN or infinity; the training that wrote it diverged."
            )
    model.load_state_dict(loaded, strict=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise KeyholeError(
            "weights files need the package 'safetensors'; install keyhole again with its dependencies."
        ) from error
    if not path.is_file():
        raise ModelError(f"weights file '{path}' does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights file '{path}' is not a safetensors file, or is cut off ({cause(error)}); write one with "
            "safetensors.torch.save_file(model.state_dict(), path). Pickles (.pt, .pth) are never loaded."
        ) from error


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"
