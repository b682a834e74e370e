from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import answer, ask, context, make_model
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from keyhole.core import defense as core
from keyhole.core.defense import Defense, chain
from keyhole.core.keys import fold_in, new_key
from keyhole.core.modes import norm_layers
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Bounds, Task
from keyhole.core.types import Tensors, Weights
from keyhole.errors import ConfigError, ModelError
from keyhole.fl import DefenseMod
from keyhole.fl.convert import parameter_names, to_record, to_tensors
from keyhole.fl.mods import round_key

UPDATE_LEVEL = [
    card.name
    for card in DEFENSES
    if all(
        getattr(type(card.factory()), hook) is getattr(Defense, hook)
        for hook in ("on_batch", "on_task", "on_loss", "on_gradient")
    )
]


def trained(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights as after training: every array moved, buffers too."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.01 * torch.randn(t.shape, generator=made) if t.is_floating_point() else t + 5
        for name, t in state.items()
    }


def run(mod: DefenseMod, model: nn.Module, where: Context, turn: int = 1, seed: int = 0) -> Message:
    def train(message: Message, own: Context) -> Message:
        return answer(message, ArrayRecord(trained(to_tensors(message.content["arrays"]), seed)), loss=0.5)

    app = ClientApp(mods=[mod])
    app.train()(train)
    # `train` is registered without mods of its own, so that those of the app run around it.
    return app(ask(model, where.node_id, turn), where)


def arrays(reply: Message) -> Tensors:
    assert not reply.has_error(), reply.error.reason
    return to_tensors(reply.content["arrays"])


def test_there_are_update_level_defenses() -> None:
    assert {"gaussian_noise", "random_masking", "top_k", "withhold"} <= set(UPDATE_LEVEL)


@pytest.mark.parametrize("name", UPDATE_LEVEL)
def test_the_mod_does_what_on_update_does_with_the_same_key_over_two_rounds(name: str) -> None:
    """Worked out with the defense itself, from the same weights and a key drawn from the same seed."""
    torch.manual_seed(0)
    model = make_model()
    start = copy.deepcopy(model.state_dict())
    names = dict(model.named_parameters())
    defense, where = DEFENSES.build(name), context(7, partition=3)
    mod = DefenseMod(defense, model, seed=11)
    norms = norm_layers(model)
    scales = frozenset(f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias"))
    task = Task(model, lambda a, b: a, (1, 8, 8), 3, Bounds.of((0.0,), (1.0,)), "4", scales, norms)
    state: dict[str, Tensors] = {}
    for turn in (1, 2):
        got = arrays(run(mod, model, where, turn, seed=turn))
        moved = trained(start, turn)
        params = {n: start[n] for n in names}
        buffers = {n: t for n, t in start.items() if n not in names}
        key = fold_in(fold_in(new_key(11), "client 3"), f"round {turn}")
        ctx = core.Context(task, Weights(params, buffers), key, round=turn, client=3, state=state)
        expected = defense.on_update({n: start[n] - moved[n] for n in names}, ctx)
        for n in names:
            assert torch.equal(got[n], start[n] - expected[n]), n
        for n in buffers:
            assert torch.equal(got[n], moved[n]), n


def test_buffers_metrics_and_order_are_left_as_they_were() -> None:
    model = make_model()
    mod = DefenseMod(DEFENSES.build("gaussian_noise", std=1.0), model)
    bare = to_record(trained(model.state_dict()))
    reply = run(mod, model, context())
    record = reply.content["arrays"]
    assert list(record) == list(model.state_dict())
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert record[name].data == bare[name].data
    assert dict(reply.content["metrics"]) == {"num-examples": 8, "loss": 0.5}
    assert (arrays(reply)["4.weight"] - to_tensors(bare)["4.weight"]).std() > 0.5


def test_the_delta_is_defended_and_never_the_weights() -> None:
    """Dropping 90 % of the update leaves 90 % of the weights as they were sent; dropping weights would zero them."""
    model = make_model()
    mod = DefenseMod(DEFENSES.build("random_masking", rate=0.9), model, seed=0)
    got = arrays(run(mod, model, context()))["4.weight"]
    assert 0.8 < (got == model.state_dict()["4.weight"]).float().mean() < 0.97
    assert (got != 0).all()


def test_randomness_comes_from_the_operating_system_unless_a_seed_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    noise = DEFENSES.build("gaussian_noise", std=1.0)
    mod = DefenseMod(noise, model)
    torch.manual_seed(0)
    first = arrays(run(mod, model, context()))["4.weight"]
    torch.manual_seed(0)
    assert not torch.equal(first, arrays(run(mod, model, context()))["4.weight"])
    drawn: list[int] = []
    monkeypatch.setattr("keyhole.fl.mods.secrets.randbits", lambda bits: drawn.append(bits) or len(drawn))
    assert round_key(None, 1, 1).tolist() == [1, 2]
    assert drawn == [32, 32]
    assert "fixed seed" not in caplog.text
    run(DefenseMod(noise, model, seed=0), model, context())
    assert "Simulation only" in caplog.text
    keys = {tuple(round_key(0, client, turn).tolist()) for client in (1, 2) for turn in (1, 2, 1)}
    assert len(keys) == 4


class Breaks(Defense):
    def on_update(self, update: Tensors, ctx: core.Context) -> Tensors:
        raise RuntimeError(f"secret value {float(update['4.bias'][0])}")


class Nan(Defense):
    def on_update(self, update: Tensors, ctx: core.Context) -> Tensors:
        return {name: value * float("nan") for name, value in update.items()}


class Fewer(Defense):
    def on_update(self, update: Tensors, ctx: core.Context) -> Tensors:
        return {"4.bias": update["4.bias"]}


@pytest.mark.parametrize(
    ("defense", "said"), [(Breaks(), "failed (RuntimeError)"), (Nan(), "not finite"), (Fewer(), "other parameters")]
)
def test_a_defense_that_fails_sends_an_error_and_no_update(defense: Defense, said: str) -> None:
    reply = run(DefenseMod(defense, make_model()), make_model(), context())
    assert reply.has_error() and not reply.has_content()
    assert said in str(reply.error.reason)
    assert "secret value" not in str(reply.error.reason)


def _without(state: Any) -> None:
    return None


def _nan(state: Any) -> Any:
    return {**state, "4.bias": state["4.bias"] * float("nan")}


def _reshaped(state: Any) -> Any:
    return {**state, "4.bias": torch.zeros(5)}


def _extra(state: Any) -> Any:
    return {**state, "adapter.weight": torch.zeros(5)}


@pytest.mark.parametrize(
    ("change", "said"),
    [(_without, "no arrays"), (_nan, "not finite"), (_reshaped, "shape (5,)"), (_extra, "'adapter.weight'")],
)
def test_a_reply_that_cannot_be_defended_becomes_an_error(change: Any, said: str) -> None:
    model = make_model()

    def train(message: Message, where: Context) -> Message:
        state = change(model.state_dict())
        return answer(message, None if state is None else ArrayRecord(state))

    where = context()
    reply = DefenseMod(DEFENSES.build("top_k"), model)(ask(model), where, train)
    assert reply.has_error() and not reply.has_content()
    assert said in str(reply.error.reason)
    assert not where.state, "nothing is remembered of a round that was not sent"


def test_parameters_in_a_second_record_cannot_slip_through() -> None:
    model = make_model()

    def train(message: Message, where: Context) -> Message:
        reply = answer(message, ArrayRecord(model.state_dict()))
        reply.content["variates"] = ArrayRecord({"4.bias": ArrayRecord(model.state_dict())["4.bias"]})
        return reply

    reply = DefenseMod(DEFENSES.build("clip"), model)(ask(model), context(), train)
    assert "several array records" in str(reply.error.reason)


def with_second(key: str, names: str, sent: list[Any]) -> Any:
    """An app whose replies carry the trained weights a second time, under other names perhaps."""

    def train(message: Message, where: Context) -> Message:
        record = ArrayRecord(trained(to_tensors(message.content["arrays"])))
        reply = answer(message, record)
        reply.content[key] = ArrayRecord({names + name: array for name, array in record.items()})
        sent.append({name: array.data for name, array in reply.content[key].items()})
        return reply

    return train


@pytest.mark.parametrize("names", ["model.", ""])
def test_a_second_record_of_arrays_leaves_only_by_name(names: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where its arrays are named as the model's parameters are, as the control variates of SCAFFOLD."""
    model, defense, sent = make_model(), DEFENSES.build("clip", norm=1e-3), []
    start = to_tensors(ArrayRecord(model.state_dict()))
    where = context()
    for mod in (DefenseMod(defense, model), DefenseMod(defense, model, allow=("other",))):
        reply = mod(ask(model), where, with_second("raw", names, sent))
        assert reply.has_error() and not reply.has_content() and not where.state
    if names:
        assert "'raw' beside the model's" in str(reply.error.reason) and "allow=('raw',)" in str(reply.error.reason)
    assert "undefended: other" in caplog.text
    allowed = DefenseMod(defense, model, allow=("raw",))(ask(model), where, with_second("raw", names, sent))
    assert (start["4.weight"] - arrays(allowed)["4.weight"]).norm() <= 1.01e-3
    assert {name: array.data for name, array in allowed.content["raw"].items()} == sent[-1]


def test_what_is_allowed_is_never_the_models_record() -> None:
    model = make_model()
    mod = DefenseMod(DEFENSES.build("clip"), model, allow=("arrays",))
    assert "no arrays" in str(run(mod, model, context()).error.reason)
    with pytest.raises(ConfigError, match=r"allow=\('arrays',\)"):
        DefenseMod(DEFENSES.build("clip"), model, allow="arrays")  # type: ignore[arg-type]


def test_an_app_may_keep_some_layers_to_itself() -> None:
    """Federated personalisation: the head never leaves, and the body that does is defended."""
    model = make_model()

    def train(message: Message, where: Context) -> Message:
        moved = trained(to_tensors(message.content["arrays"]))
        return answer(message, ArrayRecord({n: t for n, t in moved.items() if not n.startswith("4.")}))

    got = arrays(DefenseMod(DEFENSES.build("clip", norm=1e-3), model)(ask(model), context(), train))
    assert set(got) == {name for name in model.state_dict() if not name.startswith("4.")}
    assert 0 < (model.state_dict()["0.weight"] - got["0.weight"]).norm() <= 1.01e-3


def test_frozen_layers_come_back_as_they_were_and_are_no_part_of_the_update() -> None:
    model, seen = make_model(), []
    model[0].requires_grad_(False)

    class Noise(Defense):
        def on_update(self, update: Tensors, ctx: core.Context) -> Tensors:
            seen.append((set(update), set(ctx.weights.params)))
            return {name: value + 1 for name, value in update.items()}

    def train(message: Message, where: Context) -> Message:
        state = to_tensors(message.content["arrays"])
        moved = trained(state)
        body = {name: state[name] for name in state if name.startswith("0.")}
        return answer(message, ArrayRecord({**moved, **(body if honest else {})}))

    mod, honest = DefenseMod(Noise(), model), True
    got = arrays(mod(ask(model), context(), train))
    assert torch.equal(got["0.weight"], model.state_dict()["0.weight"])
    assert (got["4.weight"] - model.state_dict()["4.weight"]).abs().min() > 0.5
    assert seen == [({"1.weight", "1.bias", "4.weight", "4.bias"},) * 2]
    honest = False
    reply = mod(ask(model), context(), train)
    assert "changes '0." in str(reply.error.reason) and "frozen" in str(reply.error.reason)
    with pytest.raises(ConfigError, match="nothing to defend"):
        DefenseMod(Noise(), make_model().requires_grad_(False))


def test_other_messages_pass_unless_they_carry_arrays() -> None:
    model = make_model()
    mod = DefenseMod(DEFENSES.build("clip"), model)
    passed = mod(ask(model, kind="evaluate"), context(), lambda m, c: answer(m, None, accuracy=0.25))
    assert passed.content["metrics"]["accuracy"] == 0.25
    smuggled = mod(ask(model, kind="query.it"), context(), lambda m, c: answer(m, ArrayRecord(model.state_dict())))
    assert smuggled.has_error() and "does not answer a training message" in str(smuggled.error.reason)


def test_training_does_not_begin_where_the_weights_are_of_another_model() -> None:
    ran: list[int] = []
    mod = DefenseMod(DEFENSES.build("clip"), nn.Linear(3, 3))
    reply = mod(ask(make_model()), context(), lambda m, c: ran.append(1) or answer(m, None))
    assert reply.has_error() and not ran


def test_an_app_that_writes_into_the_message_is_defended_all_the_same() -> None:
    model = make_model()
    start = model.state_dict()["4.weight"].clone()

    def train(message: Message, where: Context) -> Message:
        message.content["arrays"] = ArrayRecord(trained(to_tensors(message.content["arrays"])))
        return answer(message, message.content["arrays"])

    reply = DefenseMod(DEFENSES.build("clip", norm=1e-3), model)(ask(model), context(), train)
    moved = start - arrays(reply)["4.weight"]
    assert 0 < moved.norm() <= 1.01e-3


@pytest.mark.parametrize("name", ["soteria", "dp_sgd", "concealing", "obscuring"])
def test_defenses_that_are_not_about_the_update_are_refused(name: str) -> None:
    known = {card.name for card in DEFENSES}
    (found,) = [k for k in known if k == name or k.startswith(name)] or pytest.fail(f"no defense {name} in {known}")
    for defense in (DEFENSES.build(found), chain(DEFENSES.build("clip"), DEFENSES.build(found))):
        with pytest.raises(ConfigError, match="which a mod cannot do"):
            DefenseMod(defense, make_model())


@pytest.mark.parametrize("wrong", ["clip", None, Fewer])
def test_what_is_no_defense_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^defense is .*; a defense is needed, such as"):
        DefenseMod(wrong, make_model())


def test_tied_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ModelError, match=r"'0.weight' and '1.weight' are one tensor"):
        DefenseMod(DEFENSES.build("clip"), model)


def test_records_and_tensors_by_name() -> None:
    model = make_model()
    record = ArrayRecord(model.state_dict())
    tensors = to_tensors(record)
    assert {n: a.data for n, a in to_record(tensors).items()} == {n: a.data for n, a in record.items()}
    tensors["4.bias"] += 1
    assert not torch.equal(to_tensors(record)["4.bias"], tensors["4.bias"])
    assert parameter_names(model) == tuple(name for name, _ in model.named_parameters())
