"""Keys: the published answers of Threefry, the laws of the draws, and their independence of everything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.func import vmap

from keyhole.core import keys

KEY = keys.new_key(7)
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "fold_in": lambda k: keys.fold_in(k, "purpose"),
    "split": lambda k: keys.split(k, 3),
    "advance": lambda k: keys.advance(k, 5),
    "uniform": lambda k: keys.uniform(k, (3, 2), torch.float64),
    "normal": lambda k: keys.normal(k, (5,), torch.float64),
    "bernoulli": lambda k: keys.bernoulli(k, 0.4, (9,)),
    "integers": lambda k: keys.integers(k, 11, (9,)),
    "permutation": lambda k: keys.permutation(k, 6),
}


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(
    key: tuple[int, int], counter: tuple[int, int], answer: tuple[int, int]
) -> None:
    out = keys.threefry2x32(torch.tensor(key), torch.tensor([counter, counter]))
    assert out.dtype == torch.int64
    assert out.tolist() == [list(answer)] * 2


def test_normal_draws_are_standard_normal() -> None:
    drawn = keys.normal(KEY, (20001,), torch.float64).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    # Box-Muller makes pairs: both halves, and the products of the pairs, must be as independent draws are.
    first, second = drawn[:10000], drawn[10001:20001]
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(10000)
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 4 / math.sqrt(10000)


def test_normal_tails_reach_as_far_as_they_should() -> None:
    drawn = keys.normal(KEY, (100000,), torch.float64).abs()
    expected = 100000 * 2 * stats.norm.sf(3.5)
    assert abs(int((drawn > 3.5).sum()) - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_draws_are_uniform(dtype: torch.dtype) -> None:
    drawn = keys.uniform(KEY, (20000,), dtype)
    assert drawn.dtype == dtype
    assert stats.kstest(drawn.double().numpy(), "uniform").pvalue > 1e-3
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1


def test_uniform_stays_below_one_where_rounding_would_reach_it() -> None:
    # In bfloat16 one draw in 512 rounds up to 1.
    assert float(keys.uniform(KEY, (100000,), torch.bfloat16).max()) < 1


@pytest.mark.parametrize("draw", [keys.normal, keys.uniform])
def test_purposes_give_different_and_uncorrelated_streams(draw: Callable[..., Tensor]) -> None:
    n = 20000
    purposes = ["attacker", "client", "defense", 0, 1]
    streams = torch.stack([draw(keys.fold_in(KEY, p), (n,), torch.float64) for p in purposes])
    streams = torch.cat([streams, draw(KEY, (n,), torch.float64)[None]])
    away = torch.corrcoef(streams) - torch.eye(len(streams), dtype=torch.float64)
    assert float(away.abs().max()) < 4.5 / math.sqrt(n)


def test_neighbouring_seeds_ticks_and_splits_are_uncorrelated() -> None:
    n = 20000
    some = [keys.new_key(0), keys.new_key(1), *keys.split(KEY, 3), keys.advance(KEY, 1), keys.advance(KEY, 2)]
    streams = torch.stack([keys.normal(k, (n,), torch.float64) for k in some])
    away = torch.corrcoef(streams) - torch.eye(len(some), dtype=torch.float64)
    assert float(away.abs().max()) < 4.5 / math.sqrt(n)


def test_split_gives_distinct_keys() -> None:
    children = keys.split(KEY, 1000)
    assert children.shape == (1000, 2)
    assert len({tuple(k) for k in children.tolist()} | {tuple(KEY.tolist())}) == 1001


def test_advance_wraps_within_32_bits() -> None:
    assert keys.advance(torch.tensor([3, 0xFFFFFFFF]), 2).tolist() == [3, 1]


@pytest.mark.parametrize("name", DRAWS)
def test_lifted_draws_equal_looped_ones_whatever_the_number_of_trials(name: str) -> None:
    draw = DRAWS[name]
    some = keys.split(KEY, 30)
    looped = torch.stack([draw(k) for k in some])
    assert torch.equal(vmap(draw)(some), looped)
    assert torch.equal(vmap(draw)(some[:3]), looped[:3])
    assert len(looped.flatten(1).unique(dim=0)) > 1


def test_a_draw_depends_on_the_key_alone() -> None:
    before = keys.normal(KEY, (4,))
    torch.manual_seed(1)
    keys.normal(keys.new_key(9), (100,))
    assert torch.equal(keys.normal(KEY, (4,)), before)


def test_a_permutation_is_one_and_all_orders_are_equally_likely() -> None:
    assert keys.permutation(KEY, 50).sort().values.tolist() == list(range(50))
    drawn = vmap(lambda k: keys.permutation(k, 3))(keys.split(KEY, 3000))
    counts = drawn.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_bernoulli_and_integers_follow_their_laws() -> None:
    hits = int(keys.bernoulli(KEY, 0.3, (20000,)).sum())
    assert stats.binomtest(hits, 20000, 0.3).pvalue > 1e-3
    assert bool(keys.bernoulli(KEY, 1.0, (1000,)).all())
    assert not bool(keys.bernoulli(KEY, 0.0, (1000,)).any())
    drawn = keys.integers(KEY, 7, (20000,))
    assert stats.chisquare(torch.bincount(drawn, minlength=7).numpy()).pvalue > 1e-3
    assert (int(drawn.min()), int(drawn.max())) == (0, 6)


def test_scalars_and_empty_shapes_can_be_drawn() -> None:
    assert keys.normal(KEY, ()).shape == ()
    assert keys.uniform(KEY, (0, 3)).shape == (0, 3)
    assert keys.normal(KEY, (0,)).shape == (0,)


def test_modules_draw_by_a_key_and_the_global_state_is_left_alone() -> None:
    state, drawn = torch.get_rng_state(), []
    for key in (KEY, KEY, keys.fold_in(KEY, "other")):
        with keys.seeded(key):
            drawn.append(torch.nn.Linear(3, 2).weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(RuntimeError, match="in between"), keys.seeded(KEY):
        raise RuntimeError("in between")
    assert torch.equal(state, torch.get_rng_state())
