"""Mods that are right, and mods that are wrong in one way each: which is which, and with what numbers."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod, message_size_mod

from keyhole import cli
from keyhole.core.defense import chain
from keyhole.core.registry import DEFENSES
from keyhole.errors import ConfigError, Unmet
from keyhole.fl import DefenseMod, ModFacts, check_mod
from keyhole.fl import check as checked
from keyhole.fl.bench import Bench
from keyhole.fl.facts import BY_ENTRY, BY_TENSOR, TOGETHER

Arrays = dict[str, np.ndarray]
CLIP, STD, COUNT, NORMS = 1.0, 0.05, 40, (1e-3, 0.1, 10.0, 1e3)


class Net(nn.Module):
    """Two layers, BatchNorm and its buffers; on request a single number as a parameter."""

    def __init__(self, scalar: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        if scalar:
            self.scale = nn.Parameter(torch.tensor(1.0))


class Mine:
    """A user's mod, right unless told otherwise: w + change(v - w) for parameters, and errors where it cannot be."""

    def __init__(self, change: Callable[..., Arrays], *, strict: bool = True, whole: bool = False) -> None:
        self.change, self.strict, self.whole = change, strict, whole

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        received = {n: a.numpy() for n, a in message.content["arrays"].items()}
        number = int(message.content["config"]["server-round"]), context.node_id
        reply = call_next(message, context)
        if reply.has_error() or (not self.strict and "arrays" not in reply.content):
            return reply
        records = reply.content.array_records
        if self.strict and message.metadata.message_type != MessageType.TRAIN:
            return Message(Error(6, "not a training message"), reply_to=message) if records else reply
        made = {n: a.numpy() for n, a in records.get("arrays", {}).items()}
        broken = set(made) != set(received) or any(not np.isfinite(one).all() for one in made.values())
        if self.strict and (broken or len(records) != 1):
            return Message(Error(6, "not as it should be"), reply_to=message)
        names = [n for n in received if made[n].dtype.kind == "f" and (self.whole or "running" not in n)]
        moved = {n: made[n].astype(float) - received[n] for n in names}
        changed = self.change(moved, received, number)
        left = {n: np.asarray(received[n] + one).astype(made[n].dtype) for n, one in changed.items()}
        reply.content["arrays"] = ArrayRecord({n: Array(left.get(n, one)) for n, one in made.items()})
        return reply


def norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum((one**2).sum() for one in arrays.values())))


def clipped(moved: Arrays, to: float = CLIP) -> Arrays:
    factor = min(1.0, to / max(norm(moved), 1e-30))
    return {n: one * factor for n, one in moved.items()}


def noised(moved: Arrays, rng: np.random.Generator, std: float = STD) -> Arrays:
    return {n: one + std * rng.standard_normal(one.shape) for n, one in moved.items()}


def facts(change: Callable[..., Arrays], model: Any = None, messages: int = COUNT, **how: Any) -> ModFacts:
    torch.manual_seed(0)
    return check_mod(Mine(change, **how), model or Net(), norms=NORMS, messages=messages)


def both(**how: Any) -> ModFacts:
    """Clipped to 1 over all parameters, then Gaussian noise of 0.05: as it should be."""
    rng = np.random.default_rng(1)
    return facts(lambda moved, *_: noised(clipped(moved), rng), **how)


def test_a_mod_that_is_right_is_found_right() -> None:
    found = both()
    assert found.parameters == 12 * 8 + 8 + 16 + 24 + 3
    assert found.clip is not None and found.noise is not None and found.bias is not None and found.kurtosis is not None
    assert found.clip.low < CLIP < found.clip.high < 1.05 * CLIP
    assert (found.clip_over, found.unclipped) == (TOGETHER, ())
    assert found.noise.low < STD < found.noise.high < 1.05 * STD
    assert set(found.noise_by_tensor) == {n for n, _ in Net().named_parameters()}
    assert not found.noise_varies and not found.noise_follows_update
    assert found.kurtosis.low < 0 < found.kurtosis.high
    assert not found.repeats and not found.weights_matter and not found.bias.seen and not found.zeroed
    assert found.buffers == {"floating-point": "as the app made them", "integer": "as the app made them"}
    assert found.crowding is None and found.records == "as the app made them" and not found.keeps_state
    assert not any(case.bare for case in found.cases.values())
    assert [level.norm for level in found.levels] == list(NORMS)
    found.expect(clip=CLIP, noise_std=STD)
    said = str(found)
    assert "Clip: at a norm of 1.0" in said or "Clip: at a norm of 0.9" in said
    assert f"over {TOGETHER}." in said and "not a proof of privacy" in said


def test_what_is_not_as_expected_is_said_with_the_number() -> None:
    found = both()
    for wrong, sentence in (
        ({"clip": 2.0}, r"clipped to a norm of \S+ \(.*\); 2 was expected"),
        ({"noise_std": STD / 2}, r"standard deviation of 0.0\d+ .*; 0.025 was expected"),
        ({"noise_std": 0.0}, "0 was expected"),
        ({"clip": CLIP, "within": 0.001}, "cannot be told from 1 or from others; try more messages"),
        ({"noise_std": STD, "within": 0.0001}, "cannot be told|was expected"),
    ):
        with pytest.raises(Unmet, match=sentence):
            found.expect(**wrong)
    # For test-suites.
    with pytest.raises(AssertionError):
        found.expect(clip=2.0)
    nothing = facts(lambda moved, *_: moved)
    assert nothing.clip is None and nothing.noise is None
    nothing.expect(noise_std=0.0)
    with pytest.raises(Unmet, match=r"^No clip is seen; 1 was expected. There is no noise; .* 0.05 was expected.$"):
        nothing.expect(clip=CLIP, noise_std=STD)


def test_a_clip_of_each_tensor_is_found_with_and_without_noise() -> None:
    def each(moved: Arrays, *_: Any) -> Arrays:
        return {n: clipped({n: one})[n] for n, one in moved.items()}

    rng = np.random.default_rng(5)
    for change in (each, lambda moved, *_: noised(each(moved), rng, 0.01)):
        found = facts(change)
        assert found.clip_over == BY_TENSOR
        assert found.clip is not None and found.clip.value == pytest.approx(6**0.5, rel=0.01)
        with pytest.raises(Unmet, match="clip is over each tensor by itself, not over all parameters together"):
            found.expect(clip=6**0.5)
        assert found.bias is not None and not found.bias.seen


def test_a_clip_of_single_entries_is_found() -> None:
    found = facts(lambda moved, *_: {n: np.clip(one, -0.1, 0.1) for n, one in moved.items()})
    assert found.clip_over == BY_ENTRY
    with pytest.raises(Unmet, match="single entries"):
        found.expect(clip=1.0, within=0.9)


def test_noise_off_by_the_root_of_two_is_found() -> None:
    rng = np.random.default_rng(5)
    found = facts(lambda moved, *_: noised(moved, rng, STD * 2**0.5))
    assert found.noise is not None and found.noise.value == pytest.approx(STD * 2**0.5, rel=0.03)
    with pytest.raises(Unmet, match=r"deviation of 0.0(69|70|71|72)\d* .*; 0.05 was expected"):
        found.expect(noise_std=STD)


def test_noise_that_differs_between_tensors_or_grows_with_the_update_is_found() -> None:
    rng = np.random.default_rng(5)
    found = facts(lambda moved, *_: noised(moved, rng) | {"last.bias": moved["last.bias"]})
    assert found.noise_varies == ("last.bias",)
    with pytest.raises(Unmet, match="not the same in 'last.bias'"):
        found.expect(noise_std=STD)
    late = facts(lambda moved, *_: noised(moved, rng) if norm(moved) > 1 else moved)
    with pytest.raises(Unmet, match="not the same on large updates"):
        late.expect(noise_std=0.0)
    assert "Noise: follows the update; standard deviation 0 on the smallest." in str(late)
    # Noise before the clip is scaled with the update.
    found = facts(lambda moved, *_: clipped(noised(moved, rng)))
    assert found.noise_follows_update
    with pytest.raises(Unmet, match="not the same on large updates"):
        found.expect(noise_std=STD)


def test_noise_of_one_size_is_not_called_another_by_chance() -> None:
    """A single number among many in few messages: 95 % intervals of its size were apart from the rest's in 1 of 25."""
    rng = np.random.default_rng(0)
    for draw in (rng.standard_normal, lambda size: rng.laplace(size=size)):
        for _ in range(400):
            rest = draw((16, 60))
            assert not checked._other_std(rest[:, :1], rest)
    rest = rng.standard_normal((16, 60))
    assert checked._other_std(4 * rest[:, :4], rest) and checked._other_std(rest, 2 * rest)
    assert checked._other_std(0 * rest, rest) and not checked._other_std(0 * rest, 0 * rest)


def test_laplace_noise_is_told_from_gaussian() -> None:
    rng = np.random.default_rng(5)
    found = facts(lambda moved, *_: {n: one + STD * rng.laplace(size=one.shape) for n, one in moved.items()})
    assert found.noise is not None and found.noise.low < STD * 2**0.5 < found.noise.high
    assert found.kurtosis is not None and found.kurtosis.low < 3 < found.kurtosis.high and found.kurtosis.low > 1.5


def _from(seed: Callable[[tuple[int, int]], Any]) -> Callable[..., Arrays]:
    return lambda moved, received, number: noised(moved, np.random.default_rng(seed(number)))


def _global(moved: Arrays, *_: Any) -> Arrays:
    return {n: one + np.random.normal(0, STD, one.shape) for n, one in moved.items()}


def _torch(moved: Arrays, *_: Any) -> Arrays:
    return {n: one + STD * torch.randn(one.shape).numpy() for n, one in moved.items()}


def _tensors(moved: Arrays, received: Arrays, number: tuple[int, int]) -> Arrays:
    seed = secret.integers(2**31)
    return {n: noised({n: one}, np.random.default_rng(seed))[n] for n, one in moved.items()}


secret = np.random.default_rng(9)
AGAIN, NEXT, OTHER = "when a message comes again", "in a client's next round", "on another client"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (_from(lambda number: 0), {"in every message"}),
        (_from(lambda number: number), {AGAIN}),
        (_from(lambda number: number[0]), {AGAIN, OTHER}),
        (_from(lambda number: number[1]), {AGAIN, NEXT}),
        (_global, {"when the app seeds the global generators"}),
        (_torch, {"when the app seeds the global generators"}),
        (_tensors, {"in two tensors of a message"}),
        (lambda moved, *_: noised(moved, secret), set()),
    ],
    ids=["constant", "client and round", "round", "client", "numpy", "torch", "tensors", "fresh"],
)
def test_noise_that_comes_again_is_found(change: Callable[..., Arrays], where: set[str]) -> None:
    found = facts(change, messages=12)
    assert set(found.repeats) == where
    if where:
        with pytest.raises(Unmet, match=f"met again .*{min(where)}"):
            found.expect()
    found.expect(fresh=False, unbiased="in every message" not in where)


def test_bias_is_found_in_noise_and_without() -> None:
    rng = np.random.default_rng(5)
    shifted = facts(lambda moved, *_: {n: one + 0.02 for n, one in noised(moved, rng).items()})
    assert shifted.bias is not None and shifted.bias.seen and shifted.bias.entry == pytest.approx(0.02, rel=0.2)
    shrunk = facts(lambda moved, *_: {n: 0.9 * one for n, one in moved.items()})
    assert shrunk.bias is not None and shrunk.bias.share == pytest.approx(0.1, rel=1e-3)
    assert shrunk.clip is None
    for found in (shifted, shrunk):
        with pytest.raises(Unmet, match="changed on average"):
            found.expect()
        found.expect(unbiased=False)


def test_entries_that_do_not_leave_are_counted() -> None:
    def halved(moved: Arrays, *_: Any) -> Arrays:
        return {n: np.where(np.arange(one.size).reshape(one.shape) % 2 == 0, one, 0.0) for n, one in moved.items()}

    found = facts(halved)
    dropped = sum(one.numel() // 2 for one in Net().parameters())
    assert found.zeroed == pytest.approx(dropped / found.parameters)
    assert found.bias is not None and found.bias.seen and found.noise is None and not found.repeats


def test_acting_on_weights_is_found() -> None:
    def weights(moved: Arrays, received: Arrays, number: Any) -> Arrays:
        whole = clipped({n: received[n] + one for n, one in moved.items()}, 0.5)
        return {n: whole[n] - received[n] for n in moved}

    rng = np.random.default_rng(5)

    def relative(moved: Arrays, received: Arrays, number: Any) -> Arrays:
        return {n: one + 0.01 * received[n] * rng.standard_normal(one.shape) for n, one in moved.items()}

    for change in (weights, relative):
        found = facts(change)
        assert found.weights_matter > 0.01
        assert "weights; other global weights change what leaves" in str(found)
        with pytest.raises(Unmet, match="depends on the global weights"):
            found.expect(unbiased=False)
        found.expect(unbiased=False, on_delta=False)


def test_what_is_not_as_it_should_be_and_leaves_all_the_same_is_found() -> None:
    rng = np.random.default_rng(5)

    def lax(moved: Arrays, *_: Any) -> Arrays:
        return noised(moved, rng)

    found = facts(lax, strict=False)
    assert {name for name, case in found.cases.items() if case.bare} == {
        "NaN in the update",
        "infinity in the update",
        "an array that the server did not send",
        "parameters in a second record",
    }
    assert "not finite" in found.cases["NaN in the update"].leaves
    assert "as changed by the mod" in found.cases["arrays in an evaluation"].leaves
    assert found.cases["an error from the app"].leaves == "an error (the app's own)"
    assert found.cases["no arrays"].leaves == "the reply, without arrays"
    with pytest.raises(Unmet, match=r"With NaN in the update there leaves an update of norm \S+, besides values"):
        found.expect()
    found.expect(closed=False)


def test_a_single_number_that_is_spared_is_found() -> None:
    rng = np.random.default_rng(5)

    def spared(moved: Arrays, *_: Any) -> Arrays:
        rest = {n: one for n, one in moved.items() if one.ndim}
        return noised(clipped(rest), rng) | {"scale": moved["scale"]}

    found = facts(spared, Net(scalar=True))
    assert found.unclipped == ("scale",) and found.noise_varies == ("scale",) and found.clip_over == TOGETHER
    with pytest.raises(Unmet, match=r"not clipped: 'scale'. Noise is not the same in 'scale'"):
        found.expect(clip=CLIP, noise_std=STD)


def test_buffers() -> None:
    rng = np.random.default_rng(5)
    found = both(whole=True)
    assert "changed" in found.buffers["floating-point"] and "noise of standard deviation 0.0" in str(found)
    assert found.buffers["integer"] == "as the app made them"
    # Buffers that moved by 100 times the update's norm, which is 0.1, in one clip of 1 with it.
    found = facts(lambda moved, *_: clipped(moved), whole=True)
    assert found.crowding is not None and found.crowding.value == pytest.approx(1 / (100 + 0.01) ** 0.5, rel=1e-4)
    assert "Buffers that move crowd parameters out: a share of 0." in str(found)
    kept = facts(lambda moved, received, number: noised(moved, rng) | {n: 0 * received[n] for n in BUFFERS})
    assert kept.buffers["floating-point"] == "as the server sent them" and kept.crowding is None
    assert facts(lambda moved, *_: moved, nn.Linear(3, 2)).buffers == {}


BUFFERS = ("norm.running_mean", "norm.running_var")


def test_mods_are_composed_as_in_flower_the_first_one_outermost() -> None:
    rng = np.random.default_rng(5)
    clip = Mine(lambda moved, *_: clipped(moved))
    noise = Mine(lambda moved, *_: noised(moved, rng))
    check_mod([noise, clip], Net(), norms=NORMS, messages=COUNT).expect(clip=CLIP, noise_std=STD)
    with pytest.raises(Unmet, match="not the same on large updates"):
        check_mod([clip, noise], Net(), norms=NORMS, messages=COUNT).expect(noise_std=STD)


def test_metrics_and_what_is_kept() -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        context.state["arrays"] = message.content["arrays"]
        reply = call_next(message, context)
        del reply.content["notes"]
        reply.content["metrics"]["loss"] = 0.0
        reply.content["metrics"]["epsilon"] = 1.0
        return reply

    found = check_mod(mod, Net(), messages=10)
    assert found.records == "'epsilon' added; 'device' dropped; 'loss' changed" and found.keeps_state


def test_the_statistics_against_scipy_and_their_own_law() -> None:
    """Chances of no bias are uniform with entries of unequal variance; intervals hold the truth 19 times in 20."""
    rng = np.random.default_rng(0)
    scale = np.array([0.1] * 30 + [1.0] * 10)
    chances = [checked._excess(scale * rng.standard_normal((12, 40)), np.zeros(40))[1] for _ in range(400)]
    assert stats.kstest(chances, "uniform").pvalue > 0.01
    assert min(checked._excess(scale * rng.standard_normal((12, 40)) + 1.0, np.zeros(40))) < 1e-6
    held = {"normal": 0, "laplace": 0}
    for law, std, drawn in (("normal", 1.0, rng.standard_normal), ("laplace", 2**0.5, rng.laplace)):
        for _ in range(400):
            found = checked._std(drawn(size=(20, 50)))[0]
            assert found is not None
            held[law] += found.low < std < found.high
    assert all(0.92 < count / 400 < 0.98 for count in held.values()), held
    one = rng.standard_normal((15, 1))
    found = checked._std(one)[0]
    assert found is not None and found.value == pytest.approx(one.std(ddof=1))


@pytest.mark.parametrize("clips", [False, True])
def test_of_many_tensors_and_few_messages_none_is_found_wrong_by_chance(clips: bool) -> None:
    """Fifty tensors of one number to three under noise, which hides the update where it is not the largest."""
    rng, found = np.random.default_rng(0), []
    bench = Bench([], {f"{i}": torch.zeros(1 + i % 3) for i in range(50)}, {}, {})
    for _ in range(40):
        runs: list[Any] = []
        for sent in (size * bench.direction(rng) for size in NORMS):
            run = object.__new__(checked._Run)
            run.aimed, run.sent, run.norm = sent, sent, float(np.linalg.norm(sent))
            left = sent * min(1.0, CLIP / run.norm) if clips else sent
            run.out, run.first = left + STD * rng.standard_normal((10, bench.size)), (runs or [run])[0]
            runs.append(run)
        clip, over, unclipped = checked._clip(bench, runs)
        assert not unclipped and over != BY_TENSOR
        found.append(clip is not None)
    assert found == [clips] * 40


def test_fresh_noise_is_not_taken_for_the_same_by_chance() -> None:
    """Of 17,000 such draws these go together most; the mean of ten messages, taken off both, makes them more alike."""
    low, one, two = np.split(np.random.default_rng(16713).standard_normal((26, 20)), (10, 18))
    one, two = ((drawn - low.mean(0)) / low.std(0, ddof=1) for drawn in (one, two))
    assert not checked._alike(one, two) and checked._alike(one, one + 0.5 * two)


def test_a_single_number_that_noise_hardly_moved_is_not_taken_for_bare() -> None:
    """Seen on one large update, such noise is lost in rounding in a quarter of messages."""
    rng = np.random.default_rng(0)
    noise = Mine(lambda moved, *_: noised(moved, rng, 1e-4), strict=False)

    def mod(message: Message, where: Context, call_next: Any) -> Message:
        sent = set(message.content["arrays"])
        reply = noise(message, where, call_next)
        reply.content["arrays"] = ArrayRecord({n: a for n, a in reply.content["arrays"].items() if n in sent})
        return reply

    bench = Bench([mod], nn.Linear(1, 1, bias=False), {}, {})
    arrays = bench.trained(np.array([50.0]))
    bare = [checked._cases(bench, arrays)["an array that the server did not send"].bare for _ in range(5)]
    assert not any(bare)
    noise.change = lambda moved, *_: moved
    assert checked._cases(bench, arrays)["an array that the server did not send"].bare


def test_nothing_is_left_behind() -> None:
    logger = logging.getLogger("flwr")
    arrays = Net().state_dict()

    def now() -> list[int]:
        states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return [hash(random.getstate()), *(hash(tuple(one)) for one in states), logger.level]

    before = now()
    first = check_mod(LocalDpMod(1.0, 0.01, 1.0, 1e-5), arrays, messages=10)
    assert now() == before
    assert first.parameters == 147 + 16, "of a state dict every floating-point array is a parameter"


def test_flowers_clipping_mods() -> None:
    """Of 1.41: global, on the delta; buffers count, NaN takes the clip away, numbers without a dimension are spared."""
    torch.manual_seed(0)
    model = Net(scalar=True)
    for mod in (fixedclipping_mod, adaptiveclipping_mod):
        found = check_mod(mod, model, config={"clipping_norm": 0.5}, messages=10)
        assert found.clip is not None and found.clip.value == pytest.approx(0.5, rel=1e-4)
        assert (found.clip_over, found.unclipped) == (TOGETHER, ("scale",))
        assert found.noise is None and not found.weights_matter and found.crowding is not None
        assert found.cases["NaN in the update"].leaves == "an update of norm 1000, besides values that are not finite"
        assert "ZeroDivisionError" in found.cases["an update of zero"].leaves
        assert found.cases["an error from the app"].leaves == "an error (the app's own)"
        assert "expects exactly one ArrayRecord" in found.cases["an evaluation without arrays"].leaves
        with pytest.raises(Unmet, match=r"not clipped: 'scale'. With NaN"):
            found.expect(clip=0.5)
    assert found.records == "'norm_bit' added"


def test_flowers_local_dp_has_the_noise_that_it_documents_from_a_generator_that_apps_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    std = 0.01 * (2 * np.log(1.25 / 1e-5)) ** 0.5 / 0.5
    found = check_mod(LocalDpMod(1.0, 0.01, 0.5, 1e-5), Net(), norms=NORMS, messages=COUNT)
    found.expect(clip=1.0, noise_std=std, within=0.05, fresh=False, closed=False)
    assert found.repeats == ("when the app seeds the global generators",)
    monkeypatch.setattr(checked, "seed", np.random.seed)
    assert check_mod(LocalDpMod(1.0, 0.01, 0.5, 1e-5), Net(), norms=NORMS[:2], messages=10).repeats == found.repeats
    monkeypatch.setattr(checked, "seed", torch.default_generator.manual_seed)
    assert not check_mod(LocalDpMod(1.0, 0.01, 0.5, 1e-5), Net(), norms=NORMS[:2], messages=10).repeats
    assert "noise of standard deviation 0.0" in found.buffers["floating-point"]


def test_a_mod_that_only_looks_defends_nothing() -> None:
    for mod in (arrays_size_mod, message_size_mod):
        found = check_mod(mod, Net(), norms=NORMS[:2], messages=10)
        assert found.cases["an error from the app"].leaves.startswith("nothing, as it raises ValueError")
    assert found.clip is None and found.noise is None and found.bias is not None and not found.bias.seen
    assert found.cases["NaN in the update"].bare and found.cases["parameters in a second record"].bare


def test_our_own_mod(monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the operating system, whose randomness would fail the test now and then.
    monkeypatch.setattr("keyhole.fl.mods.secrets.randbits", random.Random(0).getrandbits)
    torch.manual_seed(0)
    model = Net(scalar=True)
    defense = chain(DEFENSES.build("clip", norm=CLIP), DEFENSES.build("gaussian_noise", std=STD))
    found = check_mod(DefenseMod(defense, model), model, norms=(1e-3, 0.1, 1e3), messages=16)
    found.expect(clip=CLIP, noise_std=STD)
    assert found.buffers == {"floating-point": "as the app made them", "integer": "as the app made them"}
    seeded = check_mod(DefenseMod(defense, model, seed=0), model, norms=NORMS[:2], messages=10)
    assert seeded.repeats == (AGAIN,)
    mask = DEFENSES.build("random_masking", rate=0.5, rescale=True, batchnorm=True)
    masked = check_mod(DefenseMod(mask, model), model, norms=NORMS[1:3], messages=10)
    masked.expect()
    assert 0.4 < masked.zeroed < 0.6 and masked.noise_follows_update


def test_a_level_at_which_nothing_leaves_is_told() -> None:
    model = nn.Linear(20, 10)
    model.register_buffer("index", torch.arange(4))
    # Flower's cannot scale whole numbers, other than those without dimensions.
    local = check_mod(LocalDpMod(1.0, 0.01, 1.0, 1e-5), model, messages=10)
    assert "UFuncTypeError" in local.levels[-1].withheld
    found = check_mod(fixedclipping_mod, model, config={"clipping_norm": 1.0}, messages=10)
    assert found.clip is None and [level.share is None for level in found.levels] == [False] * 4 + [True] * 3
    assert "UFuncTypeError" in found.levels[-1].withheld and "UFuncTypeError" in str(found)


def test_wrong_input_is_one_sentence() -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        raise AssertionError("never asked")

    for arguments, sentence in (
        ({"mod": fixedclipping_mod}, "there leaves an error .*requires the key 'clipping_norm'"),
        ({"mod": mod}, "there leaves nothing, as it raises AssertionError: never asked"),
        ({"mod": lambda message, context, call_next: None}, "there leaves a NoneType in place of a message"),
        ({"messages": 9}, "messages is 9; it must be at least 10"),
        ({"norms": (1.0,)}, "at least two"),
        ({"norms": (1.0, 0.1)}, "ascending"),
        ({"norms": (0.0, 0.1)}, "above 0"),
        ({"messages": 10**6}, "too much to hold; take fewer"),
        ({"model": 3}, "model is a int"),
        ({"model": {"a": torch.arange(3)}}, "no floating-point parameters"),
        ({"model": Net().bfloat16()}, "bfloat16, which Flower cannot send"),
        ({"model": Net().half(), "norms": (1e-9, 1.0)}, "an update of norm 1e-09 is lost in rounding"),
        ({"config": {"a": {}}}, "config cannot be sent"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            check_mod(**{"mod": arrays_size_mod, "model": Net(), **arguments})


def test_tells_how_far_it_is() -> None:
    said: list[tuple[str, float]] = []
    check_mod(arrays_size_mod, Net(), norms=NORMS[:3], messages=10, told=lambda *one: said.append(one))
    assert {what for what, _ in said} == {"sending 10 updates of each of 3 norms"}
    assert [part for _, part in said] == [0.0, 0.25, 0.5, 1.0]


CODE = """
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from torch import nn
one = LocalDpMod(1.0, 0.01, 1.0, 1e-5)
two = [one, fixedclipping_mod]
number = 3
def make():
    return nn.Linear(20, 10)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["mods_of_a_user:two", "--config", "clipping_norm=1.0"], 0, ""),
        (["mods_of_a_user:one", "--clip", "2.0"], 1, "clipped to a norm of 1; 2 was expected"),
        (["mods_of_a_user:one", "--noise-std", "0.02"], 1, "0.02 was expected"),
        (["mods_of_a_user:two"], 2, "requires the key 'clipping_norm'"),
        (["mods_of_a_user:LocalDpMod"], 2, "a mod that is made already"),
        (["mods_of_a_user:number"], 2, "is a int"),
        (["mods_of_a_user:three"], 2, "has no 'three'"),
        (["mods_of_a_user"], 2, "package.module:name"),
        (["absent_module:mod"], 2, "cannot be imported"),
        (["mods_of_a_user:one", "--config", "clip"], 2, "--config 'clip' must be written as KEY=VALUE"),
        (["mods_of_a_user:one", "--messages", "3"], 2, "at least 10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line(
    arguments: list[str],
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mods_of_a_user.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", lambda *a, **k: None)
    given = ["keyhole", "check-mod", "--model", "mods_of_a_user:make", "--messages", "10", *arguments]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert int(left.value.code or 0) == code
    printed = capsys.readouterr()
    assert sentence in printed.err and "Traceback" not in printed.err
    said = [line for line in printed.err.splitlines() if line != "sending 10 updates of each of 7 norms"]
    assert len(said) == (code > 0)
    assert ("210 parameters in 2 tensors" in printed.out) == (code < 2)
