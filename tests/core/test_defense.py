"""Chains of defenses and of counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keyhole.core.defense import Chain, Context, Counter, CounterChain, Defense, chain, defended_gradient, strip_prefix
from keyhole.core.keys import new_key, normal
from keyhole.core.task import Task, plain_gradient
from keyhole.core.types import Batch, GradFn, Key, Observation, Tensors, Trace, Weights


class Named(Counter):
    def __init__(self, name: str, law: str = "zero", needs: frozenset = frozenset()) -> None:
        self.name, self.truth_loss, self.needs = name, law, needs  # type: ignore[assignment]

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        return {"own": torch.tensor(float(len(self.name)))}

    def unknowns(self, task: Task, seen: tuple[Observation, ...], key: Key) -> Tensors:
        return {"guess": normal(key, (2,))}

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        return lambda w, b, k: {n: 10 * v + facts["own"] for n, v in gradient(w, b, k).items()}

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        return {n: 10 * v + facts["own"] for n, v in simulated.items()}, observed


@dataclass(frozen=True)
class Append(Defense):
    """Leaves a trace of its order: v -> 10 v + digit, everywhere."""

    digit: int
    names: tuple[str, ...] = ()

    def on_loss(self, loss: torch.Tensor, trace: Trace, batch: Batch, ctx: Context) -> torch.Tensor:
        return 10 * loss + self.digit

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        return lambda w, b, k: {n: 10 * v + self.digit for n, v in gradient(w, b, k).items()}

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        return {n: 10 * v + self.digit for n, v in update.items()}

    def counters(self) -> tuple[Counter, ...]:
        return tuple(Named(name) for name in self.names)


@dataclass(frozen=True)
class Noise(Defense):
    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        return {n: v + normal(ctx.key, tuple(v.shape), v.dtype) for n, v in update.items()}


def context(bench: Any, seed: int = 0) -> Context:
    return Context(bench.task, bench.weights, new_key(seed))


def test_a_chain_of_one_is_that_one() -> None:
    one = Append(1)
    assert chain(one) is one


def test_an_empty_chain_and_the_base_class_change_nothing(bench: Any) -> None:
    ctx, batch, update = context(bench), bench.batch(), {"w": torch.ones(3)}
    plain = plain_gradient(bench.task)(bench.weights, batch, ctx.key)
    for defense in (chain(), Defense(), chain(Defense(), Defense())):
        assert defense.on_task(bench.task) is bench.task
        assert defense.on_update(update, ctx)["w"] is update["w"]
        assert defense.counters() == ()
        got = defended_gradient(bench.task, defense, ctx)(bench.weights, batch, ctx.key)
        assert all(torch.allclose(got[n], plain[n], rtol=1e-12, atol=1e-16) for n in plain)


def test_the_first_defense_acts_first(bench: Any) -> None:
    ctx = context(bench)
    both = chain(Append(1), Append(2), Append(3))
    assert both.on_update({"w": torch.zeros(())}, ctx)["w"] == 123
    wrapped = both.on_gradient(lambda w, b, k: {"w": torch.zeros(())}, ctx)
    assert wrapped(bench.weights, bench.batch(), ctx.key)["w"] == 123
    assert both.on_loss(torch.zeros(()), None, bench.batch(), ctx) == 123  # type: ignore[arg-type]


def test_the_objective_hook_is_differentiated(bench: Any) -> None:
    ctx, batch = context(bench), bench.batch()
    got = defended_gradient(bench.task, Append(4), ctx)(bench.weights, batch, ctx.key)
    plain = plain_gradient(bench.task)(bench.weights, batch, ctx.key)
    # 10 from the objective, then the gradient wrapper's own 10 v + 4.
    assert all(torch.allclose(got[n], 100 * plain[n] + 4, rtol=1e-11, atol=1e-13) for n in plain)


def test_two_noises_in_a_chain_differ(bench: Any) -> None:
    ctx, clean = context(bench), {"w": torch.zeros(2000, dtype=torch.float64)}
    first = Chain((Noise(),)).on_update(clean, ctx)["w"]
    second = Chain((Noise(), Noise())).on_update(clean, ctx)["w"] - first
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    assert abs(float(second.std()) - 1) < 0.1
    assert abs(float(first.std()) - 1) < 0.1


def test_the_links_share_all_but_the_key(bench: Any) -> None:
    seen: list[Context] = []

    class Spy(Defense):
        def on_update(self, update: Tensors, ctx: Context) -> Tensors:
            seen.append(ctx)
            return update

    public = torch.zeros(1)
    ctx = Context(bench.task, bench.weights, new_key(1), 3, step=4, client=5, public=public, state={"residual": {}})
    chain(Spy(), Spy()).on_update({}, ctx)
    for one in seen:
        assert (one.task, one.weights, one.round, one.step, one.client) == (bench.task, bench.weights, 3, 4, 5)
        assert one.public is public
        assert one.state is ctx.state
    assert len({tuple(one.key.tolist()) for one in (ctx, *seen)}) == 3


def test_counters_of_a_chain_are_every_combination() -> None:
    both = chain(Append(1, ("a", "b")), Append(2), Append(3, ("c", "d")))
    assert [c.name for c in both.counters()] == ["a+c", "a+d", "b+c", "b+d"]
    assert [c.name for c in chain(Append(1, ("a",)), Append(2)).counters()] == ["a"]


def test_a_combination_needs_what_its_parts_need_and_is_as_sure_as_its_least_sure_part() -> None:
    parts = (Named("a", needs=frozenset({"weights"})), Named("b", needs=frozenset({"targets"})))
    assert CounterChain(parts).needs == {"weights", "targets"}
    assert CounterChain(parts).truth_loss == "zero"
    assert CounterChain((Named("a"), Named("b", "law"))).truth_loss == "none"
    assert CounterChain((Named("a"), Named("b", "none"))).truth_loss == "none"


def test_parts_read_their_own_facts_and_unknowns(bench: Any) -> None:
    both = CounterChain((Named("a"), Named("bbb")))
    facts = both.facts(bench.task, ())
    assert {name: float(v) for name, v in facts.items()} == {"0.own": 1.0, "1.own": 3.0}
    unknowns = both.unknowns(bench.task, (), new_key(0))
    assert set(unknowns) == {"0.guess", "1.guess"}
    assert not torch.equal(unknowns["0.guess"], unknowns["1.guess"])
    simulated, observed = both.compare({"w": torch.zeros(())}, {"w": torch.ones(())}, facts)
    # The client's last defense is undone first.
    assert (float(simulated["w"]), float(observed["w"])) == (31.0, 1.0)
    believed = both.believe(lambda w, b, k: {"w": torch.zeros(())}, facts, unknowns)
    assert float(believed(Weights({}, {}), bench.batch(), new_key(0))["w"]) == 13.0


def test_the_naive_counter_does_nothing(bench: Any) -> None:
    naive = Counter()
    a, b = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    compared = naive.compare(a, b, {})
    assert compared[0] is a
    assert compared[1] is b
    assert naive.facts(bench.task, ()) == {}
    assert naive.unknowns(bench.task, (), new_key(0)) == {}
    assert naive.needs == frozenset()


def test_strip_prefix_takes_its_own_entries() -> None:
    some = {"a.x": torch.zeros(1), "b.x": torch.ones(1), "a.b.x": torch.ones(2)}
    assert set(strip_prefix(some, "a.")) == {"x", "b.x"}
