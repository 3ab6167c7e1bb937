"""Tests of sparse_utils.py. Expected numbers are worked out by hand or come from the method papers' published code."""

import copy
import io
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_utils as su
from sparse_utils import Sparsifier, prune_and_grow

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}
few = settings(derandomize=True, deadline=None, max_examples=25, database=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, sizes=(6, 12, 12, 3)):
    """An MLP with LayerNorm: masked weights are those of 0, 3, 6, ..."""
    torch.manual_seed(seed)
    layers = [
        layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.LayerNorm(m), nn.ELU())
    ]
    return nn.Sequential(*layers[:-2])


def sparse_run(regime="dst", optimizer="adamw", net=None, **arguments):
    net = net or network()
    arguments = {"update_interval": 5, "total_updates": 40} | arguments
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    return net, optimizer, Sparsifier(net, optimizer, regime, **arguments)


def train(net, optimizer, sparsifier, steps, seed=0, after=lambda: None):
    data = generator(seed)
    n_in = net[0].in_features
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, n_in, generator=data)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        after()


def zeros(sparsifier):
    return {name: int((~mask).sum()) for name, mask in sparsifier.masks.items()}


# Layer-wise sparsities


@pytest.mark.parametrize(
    ("shapes", "sparsity", "expected"),
    [
        ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.5, {"a": 0, "b": 13 / 42, "c": 55 / 84}),  # by hand
        ({"a": (2, 4), "c": (3, 6, 7), "d": (7, 4)}, 0.5, {"a": 0, "c": 0.642857, "d": 0}),  # two layers become dense
        ({"a": (8, 6), "b": (4, 3)}, 0.7, {"a": 0.736111, "b": 0.472222}),
        ({"a": (80, 4), "b": (20, 20)}, 0.8, {"a": 0.695161, "b": 0.883871}),
        ({"a": (5, 4), "b": (2, 9)}, 0.0, {"a": 0, "b": 0}),
        ({"a": (30, 4)}, 0.3, {"a": 0.3}),
    ],
)
def test_erdos_renyi_gives_the_known_sparsities(shapes, sparsity, expected):
    assert su.erdos_renyi_sparsities(shapes, sparsity) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("n_in", "scale", "projection", "block"),
    # MR.Q's Q-network: `scale` blocks of two square layers of width 512 * scale; both heads give the same values
    [
        (512, 1, 0.600389, 0.600389),
        (1536, 3, 0.600056, 0.600056),
        (2560, 5, 0.600021, 0.600021),
        (1536, 1, 0.666861, 0.500292),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_erdos_renyi_on_the_papers_critic_leaves_only_the_output_dense(n_in, scale, projection, block, heads):
    width = 512 * scale
    shapes = {}
    for head in range(heads):
        shapes[f"q{head}.projection"] = (width, n_in)
        shapes |= {f"q{head}.linear{i}": (width, width) for i in range(2 * scale)}
        shapes[f"q{head}.output"] = (1, width)
    sparsities = su.erdos_renyi_sparsities(shapes, 0.6)
    assert sparsities["q0.output"] == 0
    assert sparsities["q0.projection"] == pytest.approx(projection, abs=1e-6)
    assert sparsities["q0.linear1"] == pytest.approx(block, abs=1e-6)


@few
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.floats(0, 0.99),
)
def test_erdos_renyi_keeps_the_total_and_one_eps_for_all_layers_that_are_not_dense(shapes, sparsity):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    sparsities = su.erdos_renyi_sparsities(shapes, sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(sparsities[n] * size[n] for n in shapes) == pytest.approx(sparsity * sum(size.values()), abs=1e-6)
    eps = [(1 - s) * size[n] / sum(shapes[n]) for n, s in sparsities.items() if s > 0]
    assert eps == pytest.approx([eps[0]] * len(eps)) if eps else True
    assert all(0 <= s < 1 for s in sparsities.values())


def test_uniform_sparsity_is_the_same_everywhere():
    assert su.uniform_sparsities({"a": (2, 4), "b": (3, 6)}, 0.6) == {"a": 0.6, "b": 0.6}


def test_uniform_with_dense_output_keeps_all_parallel_heads_dense_and_the_total():
    shapes = {"q1.hidden": (8, 8), "q1.output": (1, 8), "q2.hidden": (8, 8), "q2.output": (1, 8)}
    expected = 0.5 * 144 / 128  # the hidden layers hold 128 of 144 weights
    sparsities = su.uniform_dense_output(shapes, 0.5)
    assert sparsities == {"q1.hidden": expected, "q1.output": 0, "q2.hidden": expected, "q2.output": 0}
    square = su.uniform_dense_output({"a": (8, 8), "b": (8, 8)}, 0.25)
    assert square == {"a": 0.5, "b": 0}  # a square output is not taken for its hidden layers' head


# Schedules


def test_sparsity_schedule_follows_equation_2_and_is_clamped_outside_its_window():
    whole = [su.scheduled_sparsity(t, 0, 0.6, 0, 1000) for t in (100, 250, 500, 750, 900)]
    window = [su.scheduled_sparsity(t, 0, 0.6, 200, 800) for t in (100, 250, 500, 750, 900)]
    assert whole == pytest.approx([0.114, 0.2625, 0.45, 0.5625, 0.594], abs=1e-12)
    assert window == pytest.approx([0, 0.095833, 0.45, 0.595833, 0.6], abs=1e-6)
    assert window[0] == 0
    assert window[-1] == 0.6
    assert su.scheduled_sparsity(500, 0.6, 0, 0, 1000) == pytest.approx(0.15)  # 0.6 * 0.5 ** 2
    assert su.scheduled_sparsity(500, 0, 0.8, 0, 1000, power=3) == pytest.approx(0.7)  # 0.8 - 0.8 * 0.5 ** 3


def test_drop_fraction_follows_equation_1_and_stays_at_its_final_value():
    values = [su.drop_fraction(t, 1000, 0.3, 0.0) for t in (100, 250, 500, 750, 900)]
    assert values == pytest.approx([0.292658, 0.256066, 0.15, 0.043934, 0.007342], abs=1e-6)
    assert su.drop_fraction(0, 1000) == 0.5
    assert su.drop_fraction(1500, 1000, 0.5, 0.1) == su.drop_fraction(1000, 1000, 0.5, 0.1) == pytest.approx(0.1)


# Masks


@pytest.mark.parametrize(
    ("shape", "sparsity", "ones"),
    [((30, 4), 0.5, 60), ((30,), 0.1, 27), ((10, 10), 0.29, 72), ((100,), 0.57, 44), ((7,), 0.0, 7), ((5,), 0.99, 1)],
    # in binary64 0.29 * 100 is just below 29 and 0.57 * 100 just below 57: 28 and 56 zeros
)
def test_random_mask_has_exactly_floor_of_sparsity_times_size_zeros(shape, sparsity, ones):
    mask = su.random_mask(shape, sparsity, generator())
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == ones


def test_random_mask_is_uniform_over_positions():
    masks = generator()
    mean = torch.stack([su.random_mask((4, 5), 0.6, masks) for _ in range(2000)]).float().mean(0)
    assert (mean - 0.4).abs().max() < 0.05  # standard error 0.011


SIGNED = torch.tensor([-9.0, 1, 4, -1, 5, 8, -2, 3])


@pytest.mark.parametrize(
    ("n", "expected"),
    # RigL's published test: fractions 0.25, 0.5 and 1.0 of the 4 active; at 1.0 index 5 is dropped and regrown
    [(1, [1, 0, 0, 1, 0, 1, 1, 0]), (2, [1, 0, 0, 0, 1, 1, 1, 0]), (4, [1, 0, 1, 0, 1, 1, 0, 0])],
)
def test_rigl_update_matches_the_published_cases(n, expected):
    mask = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool()
    new_mask, newly_grown = prune_and_grow(SIGNED, mask, SIGNED, n, n)
    assert new_mask.int().tolist() == expected
    assert newly_grown.tolist() == (new_mask & ~mask).tolist()


def test_dropped_and_regrown_weight_keeps_its_value_and_moments_and_a_new_one_starts_at_zero():
    module = nn.Linear(10, 1, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), 0.0, amsgrad=True)
    # zeta is exactly 0.4 when it decays from 0.4 to 0.4: k = floor(0.4 * 5) = 2
    sparsifier = Sparsifier(
        module, optimizer, sparsity=0.5, update_interval=1, total_updates=9, drop_fraction=0.4, final_drop_fraction=0.4
    )
    sparsifier.masks["weight"].copy_(torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1, 0, 0]]).bool())
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.5, -0.1, 0, 0, 0.3, -0.9, 0, 0.2, 0, 0]]))
    module.weight.grad = torch.ones(1, 10)
    optimizer.step()  # fills the moments everywhere; lr 0
    moments = {key: v.clone() for key, v in optimizer.state[module.weight].items() if v.ndim}
    module.weight.grad = torch.tensor([[0.1, 9, 0.4, 0.2, 0.3, 0.1, 0.8, 0.05, 0.7, 0.6]])
    sparsifier.step()
    # drops 1 and 7, grows 1 (|g| 9) and 6 (|g| 0.8): index 1 is regrown
    assert sparsifier.masks["weight"].int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 0, 0, 0]]
    expected = torch.tensor([[0.5, -0.1, 0, 0, 0.3, -0.9, 0, 0, 0, 0]])
    assert torch.equal(module.weight.data, expected)
    assert moments.keys() == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for key, before in moments.items():
        assert torch.equal(optimizer.state[module.weight][key], torch.where(expected != 0, before, 0.0))
    assert sparsifier.replaced == 1 / 5
    assert module.weight.grad[0, [6, 7]].tolist() == pytest.approx([0.8, 0.0])  # masked by the new mask


def test_equal_magnitudes_are_dropped_and_grown_from_the_lowest_index_and_minus_zero_equals_zero():
    weight, grad = torch.tensor([1.0, -0.0, 0.0, -1.0, 0, 0]), torch.tensor([0.0, -0.0, 2, 2, -2, 2])
    new_mask, _ = prune_and_grow(weight, torch.tensor([1, 1, 1, 1, 0, 0]).bool(), grad, 1, 0)
    assert new_mask.tolist() == [1, 0, 1, 1, 0, 0]
    new_mask, _ = prune_and_grow(weight, torch.tensor([1, 0, 0, 0, 0, 0]).bool(), grad, 0, 2)
    assert new_mask.tolist() == [1, 0, 1, 1, 0, 0]
    new_mask, _ = prune_and_grow(weight, torch.tensor([1, 0, 1, 1, 1, 1]).bool(), -grad * 0, 3, 1)
    assert new_mask.tolist() == [1, 1, 0, 0, 0, 1]  # drops 2, 4, 5... of |w| 0, grows the lowest free index


@st.composite
def layers(draw):
    """Few distinct values, so that there are many ties; infinite gradients; counts up to their limits."""
    size = draw(st.integers(1, 24))
    weight = draw(st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0]), min_size=size, max_size=size))
    grad = draw(st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1.0, 3.0]), min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    n_drop = draw(st.integers(0, sum(mask)))
    return weight, grad, mask, n_drop, draw(st.integers(0, size - sum(mask) + n_drop))


@settings(few, max_examples=150)
@given(layers())
def test_rigl_update_equals_a_brute_force_search(layer):
    weight, grad, mask, n_drop, n_grow = layer
    active = [i for i, m in enumerate(mask) if m]
    kept = set(active) - set(sorted(active, key=lambda i: (abs(weight[i]), i))[:n_drop])
    free = [i for i in range(len(mask)) if i not in kept]
    expected = kept | set(sorted(free, key=lambda i: (-abs(grad[i]), i))[:n_grow])
    shape = (1, len(mask))
    new_mask, newly_grown = prune_and_grow(
        torch.tensor(weight).view(shape), torch.tensor(mask).view(shape), torch.tensor(grad).view(shape), n_drop, n_grow
    )
    assert new_mask.shape == newly_grown.shape == shape
    assert set(new_mask[0].nonzero().flatten().tolist()) == expected
    assert set(newly_grown[0].nonzero().flatten().tolist()) == expected - set(active)


@few
@given(layers(), st.integers(0, 5))
def test_set_update_drops_by_magnitude_and_grows_seeded_random_connections(layer, seed):
    weight, _, mask, n_drop, n_grow = layer
    weight, mask = torch.tensor(weight), torch.tensor(mask)
    new_mask, _ = prune_and_grow(weight, mask, None, n_drop, n_grow, "set", generator(seed))
    kept, _ = prune_and_grow(weight, mask, weight, n_drop, 0)
    again, _ = prune_and_grow(weight, mask, None, n_drop, n_grow, "set", generator(seed))
    assert torch.equal(new_mask, again)
    assert (new_mask & kept).sum() == kept.sum()
    assert new_mask.sum() == mask.sum() - n_drop + n_grow


def test_set_growth_reaches_every_connection_that_is_not_kept_just_dropped_ones_included():
    weight, mask, draws = torch.tensor([1.0, 2, 0, 0]), torch.tensor([1, 1, 0, 0]).bool(), generator()
    grown = torch.stack([prune_and_grow(weight, mask, None, 1, 1, "set", draws)[0] for _ in range(900)])
    frequency = grown.float().mean(0)
    assert frequency[1] == 1  # kept
    assert (frequency[[0, 2, 3]] - 1 / 3).abs().max() < 0.07  # standard error 0.016


# Sparsifier


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("regime", "growth"), [("sst", "rigl"), ("dst", "rigl"), ("dst", "set"), ("d2s", "rigl"), ("s2d", "rigl")])
def test_weight_gradient_and_optimizer_state_are_zero_outside_the_mask_and_nothing_is_replaced(regime, growth, optimizer):
    net, optimizer, sparsifier = sparse_run(regime, optimizer, growth=growth)
    pointers = {}

    def check():
        for name, mask in sparsifier.masks.items():
            weight = net.get_parameter(name)
            state = [s for s in optimizer.state[weight].values() if torch.is_tensor(s) and s.shape == weight.shape]
            assert state
            assert all((tensor[~mask] == 0).all() for tensor in (weight, weight.grad, *state))
            now = [tensor.data_ptr() for tensor in (weight, mask, *state)]
            assert pointers.setdefault(name, now) == now

    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    train(net, optimizer, sparsifier, 40, after=check)
    moved = any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    assert moved == (regime != "sst")
    assert sparsifier.topology_updates == (0 if regime == "sst" else 8)  # 40 updates, one in 5
    # momentum that outlives its connection would move a dropped weight: seen above as a weight off the mask
    assert all(net.get_parameter(f"{i}.bias").abs().min() > 0 for i in (0, 3, 6))  # biases are not masked


def test_dst_replaces_the_share_of_equation_1_and_keeps_every_layers_count():
    net, optimizer, sparsifier = sparse_run("dst", sparsity=0.6, total_updates=40)
    before, counts = {n: m.clone() for n, m in sparsifier.masks.items()}, zeros(sparsifier)
    assert counts["6.weight"] == 0  # (3, 12), dense under ER: eps = 34/42 of the 0.4 * 252 - 36 others, 1.54 * 15/36 < 1?
    train(net, optimizer, sparsifier, 4)
    assert all(torch.equal(before[n], m) for n, m in sparsifier.masks.items())
    assert sparsifier.replaced == 0.0
    train(net, optimizer, sparsifier, 1)
    assert zeros(sparsifier) == counts


def test_er_masks_of_a_module_have_the_total_sparsity_with_floors_per_layer():
    _, _, sparsifier = sparse_run("sst", sparsity=0.6)
    sizes = {"0.weight": 72, "3.weight": 144, "6.weight": 36}
    expected = su.erdos_renyi_sparsities({"0.weight": (12, 6), "3.weight": (12, 12), "6.weight": (3, 12)}, 0.6)
    assert zeros(sparsifier) == {name: math.floor(expected[name] * sizes[name]) for name in sizes}
