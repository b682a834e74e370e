"""One client of a training, for backends that run each client by itself.

What a defense keeps of a client between rounds stays with the client, in a file of its own after each round; the last
two are kept, as the server may have to go on from the round before.
"""

from __future__ import annotations

import time
from pathlib import Path

from torch.nn.functional import one_hot

from keyhole.core.trial import Spec
from keyhole.core.types import Tensors, Weights
from keyhole.errors import StoreError, cause
from keyhole.experiment.plan import build_defense
from keyhole.experiment.train import Problem, training_key
from keyhole.federation.local import Round, State, train_round
from keyhole.federation.states import round_key
from keyhole.solve.files import write_tensors
from keyhole.solve.threads import one_thread


def take_part(
    problem: Problem, specs: tuple[Spec, ...], seed: int, number: int, client: int, sent: Tensors, folder: Path
) -> tuple[Round, float]:
    """What one client does in a round: to the last bit what it does among others in `train_round`.

    Args:
        problem: the training's images and settings; the client takes its own part of the images.
        specs: its defense; none trains bare.
        seed: the training's.
        number: rounds done.
        client: which one, from 0.
        sent: parameters and buffers that the server sent.
        folder: where the client keeps its files.

    Returns:
        A round of one client, whose state is in the folder alone, and its seconds.

    Raises:
        StoreError: what was kept after the round before is missing or damaged.
    """
    began = time.perf_counter()
    task, like = problem.task(specs), problem.fresh(specs, seed)
    defense = build_defense(specs) if specs else None
    states = [_kept(_file(folder, client, number))] if defense is not None and number else None
    targets = one_hot(problem.labels, task.num_classes).to(problem.inputs)
    weights = Weights(*({name: sent[name].to(problem.device) for name in part} for part in like))
    local, parts = problem.federation.local(problem.plan.federation.server()), [problem.parts(seed)[client]]
    with one_thread(problem.device):
        trained = train_round(
            task, weights, problem.inputs, targets, parts, local, round_key(training_key(seed), number), number=number,
            together=1, defense=defense, states=states, public=problem.public, clients=[client],
        )  # fmt: skip
    if defense is not None:
        _keep(folder, client, number + 1, trained.states[0])
    return trained._replace(states=()), time.perf_counter() - began


def _file(folder: Path, client: int, done: int) -> Path:
    return folder / f"client-{client:03d}-round-{done:03d}.safetensors"


def _keep(folder: Path, client: int, done: int, state: State) -> None:
    named = {f"{place}/{name}": tensor for place, kept in state.items() for name, tensor in kept.items()}
    write_tensors(_file(folder, client, done), named, {"places": "/".join(state)})
    _file(folder, client, done - 2).unlink(missing_ok=True)


def _kept(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            places = filter(None, (file.metadata() or {})["places"].split("/"))
            state: State = {place: {} for place in places}
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                place, _, own = name.partition("/")
                state[place][own] = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError) as error:
        raise StoreError(
            f"what a client's defense kept cannot be read from '{path}' ({cause(error)}); train in another folder."
        ) from error
    return state
