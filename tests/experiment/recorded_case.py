"""Transcripts made file by file, of a network that gradient inversion solves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.experiment.transcript import as_json, client_file, round_folder
from keyhole.solve.files import tensors_as_bytes

LR = 0.3
QUICK = 'attacks=[{name="idlg",steps=300}]'


class Small(nn.Module):
    """A sigmoid network that gradient inversion solves."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Linear(128, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.conv(images)).flatten(1))


MODEL = f"{__name__}:Small"


def moved(model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float = LR) -> dict[str, Tensor]:
    """Plain SGD with torch's own optimizer: weights before minus weights after."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return {name: before[name] - after[name] for name, value in before.items() if value.is_floating_point()}


def record(
    folder: Path,
    model: nn.Module,
    updates: dict[str, dict[str, Tensor]],
    examples: dict[str, Any],
    number: int = 1,
    **config: Any,
) -> Path:
    """One round of a transcript."""
    place = folder / round_folder(number)
    place.mkdir(parents=True)
    (folder / "transcript.json").write_bytes(as_json({"kind": "keyhole transcript", "version": 1}))
    files = {"weights.safetensors": tensors_as_bytes(model.state_dict())}
    files |= {client_file(client): tensors_as_bytes(update) for client, update in updates.items()}
    for name, data in files.items():
        (place / name).write_bytes(data)
    clients = [
        {"client": c, "weights": "weights.safetensors", "update": client_file(c), "examples": n, "config": config}
        for c, n in examples.items()
    ]
    told = {"round": number, "clients": clients, "files": {name: len(data) for name, data in files.items()}}
    (place / "round.json").write_bytes(as_json(told))
    return folder


def change(folder: Path, client: str, number: int = 1, **facts: Any) -> None:
    """Other facts about a client in a round's list."""
    place = folder / round_folder(number) / "round.json"
    told = json.loads(place.read_text())
    (one,) = (one for one in told["clients"] if one["client"] == client)
    one |= facts
    place.write_bytes(as_json(told))


def keep(folder: Path, client: str, images: Tensor, labels: Tensor) -> Path:
    (folder / round_folder(1)).mkdir(parents=True, exist_ok=True)
    content = tensors_as_bytes({"inputs": images, "labels": labels})
    (folder / round_folder(1) / client_file(client)).write_bytes(content)
    return folder
