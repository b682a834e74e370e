"""What the server of a training sees of a round, and what its clients trained on, in the files of a transcript.

The one who attacks reads the transcript; the secrets are for scoring, in a folder of their own. See
`keyhole.experiment.transcript` for the files, which `keyhole.fl.Recorder` writes for an app of the user's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from keyhole import __version__
from keyhole.core.types import Tensors, Weights
from keyhole.errors import StoreError
from keyhole.experiment.transcript import KIND, ROUND, TRANSCRIPT, VERSION, as_json, client_file, round_folder
from keyhole.federation.local import Round
from keyhole.solve.files import make_folder, tensors_as_bytes, write_whole

WEIGHTS = "weights.safetensors"


def record_round(
    folder: Path, number: int, sent: Weights, back: Round, config: dict[str, Any], strategy: str = ""
) -> None:
    """Write one round of a transcript: global weights, and how far each client moved.

    Args:
        folder: the transcript's.
        number: of the round, from 1 on.
        sent: global weights as clients got them.
        back: what clients returned.
        config: what the server told all of them.
        strategy: what it did with the replies.
    """
    files: dict[str, Tensors] = {WEIGHTS: {**sent.params, **sent.buffers}}
    clients = []
    for client, examples in enumerate(back.examples.tolist()):
        files[client_file(str(client))] = {
            name: value - back.weights[part][name][client]
            for part, tensors in enumerate(sent)
            for name, value in tensors.items()
            if value.is_floating_point()
        }
        clients.append(
            {
                "client": str(client),
                "weights": WEIGHTS,
                "update": client_file(str(client)),
                "examples": examples,
                "config": config,
                "metrics": {"num-examples": examples},
            }
        )
    written = {name: tensors_as_bytes(tensors) for name, tensors in files.items()}
    told = {"round": number, "clients": clients, "files": {name: len(data) for name, data in written.items()}}
    about = {"kind": KIND, "version": VERSION, "keyhole": __version__, "strategy": strategy}
    try:
        make_folder(folder)
        write_whole(folder / TRANSCRIPT, as_json(about))
        _write_folder(folder / round_folder(number), {**written, ROUND: as_json(told)})
    except OSError as error:
        raise StoreError(f"cannot write to the output folder '{folder}': {error.strerror}.") from error


def record_secrets(folder: Path, number: int, inputs: Tensor, labels: Tensor, parts: Sequence[Tensor]) -> None:
    """Write what each client trained on in a round, whole images before any defense, as `record_batches` does.

    Args:
        folder: the secrets'.
        number: of the round.
        inputs: all clients' images in the model's input space, (n, *shape).
        labels: their classes, (n,).
        parts: row indices of each client.
    """
    try:
        make_folder(folder)
        files = {
            client_file(str(client)): tensors_as_bytes(
                {"inputs": inputs[part.to(inputs.device)], "labels": labels[part.to(labels.device)]}
            )
            for client, part in enumerate(parts)
        }
        _write_folder(folder / round_folder(number), files)
    except OSError as error:
        raise StoreError(f"cannot write to the output folder '{folder}': {error.strerror}.") from error


def _write_folder(place: Path, files: dict[str, bytes]) -> None:
    """All files or none."""
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for name, data in files.items():
        write_whole(partial / name, data)
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
