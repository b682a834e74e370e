"""Flower's array records as tensors by name, and which of a model's arrays are parameters."""

from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from torch import nn

from keyhole.core.types import Tensors
from keyhole.errors import ConfigError, ModelError, Refused

_STATE = "keyhole.state."
_ROUNDS = "keyhole.rounds"


def to_tensors(record: ArrayRecord) -> Tensors:
    """A record's arrays as tensors of their own, by name; changing one never changes the record."""
    # `Array.numpy` decodes bytes, and refuses pickles.
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def to_record(tensors: Tensors, like: ArrayRecord | None = None) -> ArrayRecord:
    """Tensors as a record; arrays of ``like`` that are not among them stay as they are, byte for byte, in its order."""
    made = {name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()}
    if like is None:
        return ArrayRecord(made)
    return ArrayRecord({name: made.pop(name, array) for name, array in like.items()} | made)


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """The names in a model's ``state_dict`` that are floating-point parameters; all others are buffers.

    Raises:
        ModelError: one parameter has two names. It would be sent twice, with noise drawn twice, whose mean is less.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise ModelError(f"parameters '{first}' and '{name}' are one tensor, to be sent twice; untie them.")
    sent = model.state_dict()
    return tuple(name for name in names.values() if name in sent and sent[name].is_floating_point())


def model_record(
    content: RecordDict, names: frozenset[str], whose: str, beside: frozenset[str] = frozenset()
) -> tuple[str, ArrayRecord]:
    """The one array record with any of the model's parameters, and the key it is under.

    Args:
        content: what a message carries.
        names: the model's parameters.
        whose: what the message is, for errors.
        beside: keys of records that are something else, whatever their arrays are named.

    Raises:
        Refused: there is none, or more than one.
    """
    records = content.array_records.items()
    found = [(key, record) for key, record in records if key not in beside and names & set(record)]
    if not found:
        raise Refused(f"{whose} has no arrays named as the model's parameters, such as '{min(names)}'.")
    if len(found) > 1:
        keys = " and ".join(f"'{key}'" for key, _ in found)
        raise Refused(f"{whose} has parameters of the model in several array records, {keys}; one is needed.")
    return found[0]


def check_images(inputs: object, labels: object) -> None:
    """Raise `ConfigError` unless these are tensors of images and of as many labels."""
    for what, value in (("images", inputs), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{what} are a {type(value).__name__}; a torch.Tensor is needed.")
    assert isinstance(inputs, torch.Tensor) and isinstance(labels, torch.Tensor)
    if inputs.dim() < 2 or inputs.shape[0] != labels.numel():
        raise ConfigError(f"{tuple(inputs.shape)} images and {labels.numel()} labels do not fit.")


def kept_state(context: Context) -> tuple[dict[str, Tensors], int]:
    """What a defense keeps on this client, and how many rounds it has been through."""
    records = context.state.array_records.items()
    state = {name.removeprefix(_STATE): to_tensors(record) for name, record in records if name.startswith(_STATE)}
    return state, int(str(context.state.config_records.get(_ROUNDS, {"count": 0})["count"]))


def keep_state(context: Context, state: dict[str, Tensors], rounds: int) -> None:
    """For the client's next round; Flower never sends it anywhere."""
    for name, tensors in state.items():
        context.state[f"{_STATE}{name}"] = to_record(tensors)
    context.state[_ROUNDS] = ConfigRecord({"count": rounds})
