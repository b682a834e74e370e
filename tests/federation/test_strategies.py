"""FedProx and FedAdam against loops written by hand with autograd and plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from keyhole.core.keys import fold_in, integers, new_key, normal
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Weights
from keyhole.errors import ConfigError
from keyhole.federation.states import Federation, rounds
from keyhole.federation.strategies import FedAdam, FedAvg, FedProx, Noised

SHAPE, CLASSES, EACH = (1, 4, 4), 3, 12


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def problem() -> tuple[Task, Weights, Tensor, Tensor]:
    bounds = Bounds.of((0.5,), (0.5,), torch.float64)
    labels = integers(fold_in(new_key(0), "labels"), CLASSES, (3 * EACH,))
    inputs = normal(fold_in(new_key(0), "inputs"), (3 * EACH, *SHAPE), torch.float64)
    return Task.of(model(), SHAPE, CLASSES, bounds), weights_of(model(), torch.float64), inputs, labels


SETTINGS = Federation(rounds=3, clients=3, epochs=4, lr=0.2, batch_size=EACH, momentum=0.0, clip=None)
"""Full batches, so that a client's order of images does not matter."""


def by_hand(mu: float) -> list[list[dict[str, Tensor]]]:
    """What each client sends in the first round, trained with autograd on the loss with its proximal term."""
    task, weights, inputs, labels = problem()
    parts = SETTINGS.deal(labels, fold_in(new_key(0), "clients"))
    sent = []
    for rows in parts:
        own, start = model(), model()
        for _ in range(SETTINGS.epochs):
            own.zero_grad()
            far = sum(
                (a - b.detach()).square().sum() for a, b in zip(own.parameters(), start.parameters(), strict=True)
            )
            (nn.functional.cross_entropy(own(inputs[rows]), labels[rows]) + mu / 2 * far).backward()
            with torch.no_grad():
                for p in own.parameters():
                    p -= SETTINGS.lr * p.grad
        sent.append({name: p.detach() for name, p in own.named_parameters()})
    return sent


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_a_fedprox_client_descends_its_loss_with_the_proximal_term(mu: float) -> None:
    first = next(rounds(*problem(), SETTINGS, new_key(0), strategy=FedProx(mu)))
    for client, expected in enumerate(by_hand(mu)):
        for name, value in expected.items():
            torch.testing.assert_close(first.clients.weights.params[name][client], value, rtol=0, atol=1e-12)


def test_the_proximal_term_changes_what_clients_send_and_keeps_them_nearer() -> None:
    _, start, _, _ = problem()

    def distance(strategy: FedAvg) -> float:
        after = next(rounds(*problem(), SETTINGS, new_key(0), strategy=strategy))
        return sum(float((w - start.params[n]).square().sum()) for n, w in after.clients.weights.params.items())

    assert distance(FedProx(0.7)) < 0.9 * distance(FedAvg())


def test_fedadam_steps_as_written_by_hand_over_several_rounds() -> None:
    _, start, _, _ = problem()
    strategy = FedAdam(lr=0.05, beta_1=0.8, beta_2=0.95, tau=0.01)
    w = {name: value.clone() for name, value in start.params.items()}
    m = {name: torch.zeros_like(value) for name, value in w.items()}
    v = {name: torch.full_like(value, 0.01**2) for name, value in w.items()}
    for after in rounds(*problem(), SETTINGS, new_key(0), strategy=strategy):
        for name in w:
            sent = after.clients.weights.params[name]
            delta = sum(float(n) * (sent[i] - w[name]) for i, n in enumerate(after.clients.examples)) / (3 * EACH)
            m[name] = 0.8 * m[name] + 0.2 * delta
            v[name] = 0.95 * v[name] + 0.05 * delta**2
            w[name] = w[name] + 0.05 * m[name] / (v[name].sqrt() + 0.01)
            torch.testing.assert_close(after.weights.params[name], w[name], rtol=0, atol=1e-12)
    assert after.number == 3


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(0.5), FedAdam()])
def test_training_goes_on_with_what_the_server_kept(strategy: FedAvg) -> None:
    whole = list(rounds(*problem(), SETTINGS, new_key(0), strategy=strategy))
    task, _, inputs, labels = problem()
    rest = list(
        rounds(
            task,
            whole[0].weights,
            inputs,
            labels,
            SETTINGS,
            new_key(0),
            done=1,
            strategy=strategy,
            memory=whole[0].memory,
            states=whole[0].clients.states,
        )  # fmt: skip
    )
    for name, value in whole[-1].weights.params.items():
        assert torch.equal(rest[-1].weights.params[name], value)


@pytest.mark.parametrize(
    ("kind", "option"), [(FedProx, {"mu": -1.0}), (FedAdam, {"beta_1": 1.0}), (FedAdam, {"tau": 0.0})]
)
def test_options_out_of_range_are_refused(kind: type[FedAvg], option: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        kind(**option)


def test_noise_on_the_mean_is_that_of_clients_that_weigh_the_same() -> None:
    def sent(clients: int) -> Weights:
        each = normal(new_key(3), (clients, 40, 50), torch.float64)
        return Weights({"w": each}, {"b": torch.arange(float(clients), dtype=torch.float64)[:, None]})

    trained = sent(4)
    before = Weights({"w": torch.zeros(40, 50, dtype=torch.float64)}, {})
    server, examples = Noised(FedAvg(), 0.3, new_key(9)), torch.tensor([1, 2, 3, 100])
    memory = server.begin(before)
    first, memory = server.aggregate(before, trained, examples, memory)
    second, memory = server.aggregate(before, trained, examples, memory)
    noise = [after.params["w"] - trained.params["w"].mean(0) for after in (first, second)]
    for one in noise:
        assert abs(float(one.std()) - 0.3) < 0.02
    assert abs(float((noise[0] * noise[1]).mean())) < 0.01
    assert float(first.buffers["b"]) == 1.5
    assert int(memory["noised"]["rounds"]) == 2
