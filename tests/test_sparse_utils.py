"""Tests of sparse_utils.py. Expected numbers are worked out by hand or come from the method papers' published code."""

import copy
import io
import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def network(seed=0, sizes=(6, 16, 16, 1)):
    """An MLP with LayerNorm: masked weights are those of 0, 3, 6, ..."""
    torch.manual_seed(seed)
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.LayerNorm(m), nn.ELU())]
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


def random_steps(sparsifier, n):
    """Steps with random gradients in place of a loss."""
    for _ in range(n):
        for parameter in sparsifier.module.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        sparsifier.step()
        sparsifier.optimizer.step()


def moved(sparsifier):
    """Weights outside their masks that are not 0."""
    return sum(int(((sparsifier.weights[name] != 0) & ~mask).sum()) for name, mask in sparsifier.masks.items())


# Layer-wise sparsities


@pytest.mark.parametrize(
    ("shapes", "sparsity", "expected"),
    [
        ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.5, {"a": 0, "b": 13 / 42, "c": 55 / 84}),  # by hand
        ({"a": (2, 4), "c": (3, 6, 7), "d": (7, 4)}, 0.5, {"a": 0, "c": 0.642857, "d": 0}),  # two layers become dense
        ({"a": (8, 6), "b": (4, 3)}, 0.7, {"a": 0.736111, "b": 0.472222}),  # 33 + 8 zeros: each layer's share floored
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
    [(512, 1, 0.600389, 0.600389), (1536, 3, 0.600056, 0.600056), (2560, 5, 0.600021, 0.600021)]
    + [(1536, 1, 0.666861, 0.500292)],
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
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.floats(0, 0.99))
def test_erdos_renyi_keeps_the_zeros_of_uniform_and_one_eps_for_all_layers_that_are_not_dense(shapes, sparsity):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    sparsities = su.erdos_renyi_sparsities(shapes, sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    n_zeros = sum(math.floor(sparsity * n) for n in size.values())
    assert sum(sparsities[name] * size[name] for name in shapes) == pytest.approx(n_zeros, abs=1e-6)
    eps = [(1 - s) * size[n] / sum(shapes[n]) for n, s in sparsities.items() if s > 0]
    assert eps == pytest.approx([eps[0]] * len(eps)) if eps else True
    assert all(0 <= s < 1 for s in sparsities.values())


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
    new_mask, _ = prune_and_grow(weight, torch.tensor([1, 0, 1, 1, 1, 1]).bool(), grad * 0, 3, 1)
    assert new_mask.tolist() == [1, 1, 0, 1, 0, 0]


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


def test_set_growth_reaches_every_connection_that_is_not_kept_just_dropped_ones_included():
    weight, mask, draws = torch.tensor([1.0, 2, 0, 0]), torch.tensor([1, 1, 0, 0]).bool(), generator()
    grown = torch.stack([prune_and_grow(weight, mask, None, 1, 1, "set", draws)[0] for _ in range(900)])
    frequency = grown.float().mean(0)
    assert (grown.sum(1) == 2).all()
    assert frequency[1] == 1  # kept
    assert (frequency[[0, 2, 3]] - 1 / 3).abs().max() < 0.07  # standard error 0.016


# Sparsifier


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("regime", "growth"), [("sst", "rigl"), ("dst", "rigl"), ("dst", "set"), ("d2s", "rigl"), ("s2d", "rigl")]
)
def test_weight_gradient_and_optimizer_state_are_zero_outside_the_mask_and_nothing_is_replaced(
    regime, growth, optimizer
):
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
    assert (regime == "sst") == all(torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    assert sparsifier.topology_updates == (0 if regime == "sst" else 8)  # 40 updates, one in 5
    assert all(net.get_parameter(f"{i}.bias").abs().min() > 0 for i in (0, 3, 6))  # biases are not masked


def test_er_masks_have_floor_of_each_layers_sparsity_in_zeros():
    # (16, 6), (16, 16), (1, 16): 57 + 153 + 9 zeros; the last is dense (17 / 16); eps = (149 - 16) / (22 + 32) = 2.463
    _, _, sparsifier = sparse_run("sst", sparsity=0.6)
    assert zeros(sparsifier) == {"0.weight": 41, "3.weight": 177, "6.weight": 0}  # 96 - 22 eps, 256 - 32 eps
    assert sparsifier.sparsity() == 218 / 368
    assert sparsifier.coverage() == 368 / (368 + 33 + 64)  # biases 16 + 16 + 1, two LayerNorms of 16 + 16
    # one hidden layer: 0.6 * 420 zeros, all in the (20, 20), which binary64 must not turn into 251
    _, _, sparsifier = sparse_run("sst", net=network(sizes=(20, 20, 1)), sparsity=0.6)
    assert zeros(sparsifier) == {"0.weight": 252, "3.weight": 0}


def test_uniform_distributions_differ_in_the_output_layer():
    _, _, sparsifier = sparse_run("sst", distribution="uniform", sparsity=0.5)
    assert zeros(sparsifier) == {"0.weight": 48, "3.weight": 128, "6.weight": 8}
    _, _, sparsifier = sparse_run("sst", distribution="uniform-dense-output", sparsity=0.5)
    # 184 of 352, so 50.2 of 96 and 133.8 of 256
    assert zeros(sparsifier) == {"0.weight": 50, "3.weight": 133, "6.weight": 0}


def test_dst_replaces_the_share_of_equation_1_at_multiples_of_the_interval_and_keeps_the_counts():
    net, optimizer, sparsifier = sparse_run("dst", distribution="uniform", sparsity=0.5, total_updates=20)
    counts = zeros(sparsifier)
    for step in range(1, 26):
        before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        due = sparsifier.topology_update_due
        assert due == (step % 5 == 0)
        optimizer.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        grads = {name: net.get_parameter(name).grad.clone() for name in before}
        weights = {name: net.get_parameter(name).detach().clone() for name in before}
        sparsifier.step()
        zeta = 0.25 * (1 + math.cos(math.pi * min(step, 20) / 20))  # 0.427 0.25 0.073 0 0
        new = 0
        for name, mask in sparsifier.masks.items():
            k = math.floor(zeta * int(before[name].sum())) if due else 0
            expected, newly_grown = prune_and_grow(weights[name], before[name], grads[name], k, k)
            assert torch.equal(mask, expected)
            assert torch.equal(net.get_parameter(name).grad, grads[name] * mask)
            new += int(newly_grown.sum())
        if due:
            assert sparsifier.replaced == new / 184
            assert (new > 0) == (step < 20)
        optimizer.step()
    assert sparsifier.updates == 25
    assert sparsifier.topology_updates == 5
    assert zeros(sparsifier) == counts


@pytest.mark.parametrize(
    ("regime", "arguments", "expected"),
    # eq. 2 for the (10, 10) layer at 0.6, read at steps 0, 10, ..., 100; zeros are floored
    [
        ("d2s", {}, [0, 0, 0, 18, 33, 44, 53, 58, 60, 60, 60]),  # window 20..80; 0.6 - 0.15 is below 0.45 in binary64
        ("s2d", {}, [60, 48, 38, 29, 21, 15, 9, 5, 2, 0, 0]),  # window 0..100
        ("d2s", {"schedule_start": 0.0, "schedule_end": 0.5, "power": 1.0}, [0, 12, 24, 36, 48, *[60] * 6]),
    ],
)
@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_schedules_reach_the_count_of_equation_2_at_every_update(regime, arguments, expected, growth):
    net, optimizer, sparsifier = sparse_run(
        regime, net=network(sizes=(10, 10)), update_interval=10, total_updates=100, growth=growth, **arguments
    )
    counts = zeros(sparsifier)
    measured = [counts["0.weight"]]
    for _ in range(10):
        train(net, optimizer, sparsifier, 9)
        assert zeros(sparsifier) == counts  # only at multiples of the interval
        train(net, optimizer, sparsifier, 1)
        counts = zeros(sparsifier)
        measured.append(counts["0.weight"])
        assert sparsifier.sparsity() == pytest.approx(measured[-1] / 100)
    assert measured == expected


def test_a_layers_schedule_is_its_er_sparsity_times_the_modules():
    net, optimizer, sparsifier = sparse_run("s2d", sparsity=0.6, update_interval=10, total_updates=40)
    train(net, optimizer, sparsifier, 20)
    assert zeros(sparsifier) == {"0.weight": 10, "3.weight": 44, "6.weight": 0}  # a quarter of 41.8 and 177.2


def one_update_at_constant_drop_fraction_half(regime, grad):
    """One topology update of a (10, 10) layer at half of the schedule, with weights 1..100 where active."""
    layer = network(sizes=(10, 10))
    _, _, sparsifier = sparse_run(regime, net=layer, sparsity=0.4, total_updates=10, final_drop_fraction=0.5)
    before = sparsifier.masks["0.weight"].clone()
    with torch.no_grad():
        layer[0].weight.copy_(torch.arange(1.0, 101).view(10, 10) * before)
    for _ in range(5):
        layer[0].weight.grad = grad(before)
        sparsifier.step()
    return before.flatten(), sparsifier.masks["0.weight"].flatten(), sparsifier.replaced


def test_d2s_drops_what_the_schedule_asks_for_besides_what_regrows():
    # 100 active, target 70, k = 50: drops the 80 smallest, grows 50 of these; equal gradients: the lowest indices
    _, after, replaced = one_update_at_constant_drop_fraction_half("d2s", lambda mask: torch.ones(10, 10))
    assert after.nonzero().flatten().tolist() == [*range(50), *range(80, 100)]
    assert replaced == 0.0  # all that grew had just been dropped


def test_s2d_grows_what_the_schedule_asks_for_besides_what_was_dropped():
    # 60 active, target 90, k = 30: drops 30, grows 60, first the 40 that have a gradient
    before, after, replaced = one_update_at_constant_drop_fraction_half("s2d", lambda mask: (~mask).float())
    assert int(before.sum()) == 60
    assert int(after.sum()) == 90
    assert after[~before].all()
    assert replaced == 40 / 90


def test_a_sudden_schedule_cannot_drop_more_than_there_is():
    # from dense to 0.9 in one update: k = floor(0.5 * 100) is more than the 10 that stay
    net, optimizer, sparsifier = sparse_run(
        "d2s", net=network(sizes=(10, 10)), sparsity=0.9, final_drop_fraction=0.5, schedule_start=0.0, schedule_end=0.1
    )
    train(net, optimizer, sparsifier, 5)
    assert zeros(sparsifier) == {"0.weight": 90}


def test_masks_depend_on_the_seed_alone():
    masks = [
        sparse_run("dst", net=network(seed), seed=mask_seed)[2].masks for seed, mask_seed in ((0, 1), (5, 1), (0, 2))
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


def test_a_mask_found_on_existing_optimizer_state_zeroes_it():
    net = network()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    net(torch.randn(16, 6)).square().mean().backward()
    optimizer.step()
    sparsifier = Sparsifier(net, optimizer, "sst", total_updates=10)
    mask, weight = sparsifier.masks["3.weight"], net[3].weight
    assert all((optimizer.state[weight][key][~mask] == 0).all() for key in ("exp_avg", "exp_avg_sq"))
    assert (optimizer.state[weight]["exp_avg"][mask] != 0).any()


def test_dense_regime_counts_and_touches_nothing():
    net, optimizer, sparsifier = sparse_run("dense", total_updates=5, update_interval=1)
    twin = copy.deepcopy(net)
    train(net, optimizer, sparsifier, 5)
    train(twin, OPTIMIZERS["adamw"](twin.parameters()), Mock(), 5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert sparsifier.masks == {}
    assert sparsifier.sparsity() == sparsifier.coverage() == 0.0
    assert sparsifier.updates == 5
    assert not sparsifier.topology_update_due


@pytest.mark.parametrize("optimizer", ["adamw", "adamw fused", "sgd momentum"])
@pytest.mark.parametrize(("regime", "growth"), [("dst", "rigl"), ("dst", "set"), ("d2s", "rigl"), ("s2d", "set")])
def test_resuming_from_a_saved_state_continues_bit_for_bit(regime, growth, optimizer):
    net, opt, sparsifier = sparse_run(regime, optimizer, growth=growth)
    train(net, opt, sparsifier, 13)
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict(), sparsifier.state_dict()], file)
    in_memory, replaced = sparsifier.state_dict(), sparsifier.replaced
    train(net, opt, sparsifier, 20, seed=1)

    resumed, resumed_opt, resumed_sparsifier = sparse_run(regime, optimizer, growth=growth, net=network(9), seed=9)
    pointers = [mask.data_ptr() for mask in resumed_sparsifier.masks.values()]
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for part, state in zip((resumed, resumed_opt, resumed_sparsifier), loaded, strict=True):
        part.load_state_dict(state)
    assert resumed_sparsifier.updates == 13
    assert resumed_sparsifier.replaced == replaced  # 0 in d2s, whose dense layers only regrow
    train(resumed, resumed_opt, resumed_sparsifier, 20, seed=1)

    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, resumed_sparsifier.masks[name]) for name, mask in sparsifier.masks.items())
    assert resumed_sparsifier.replaced == sparsifier.replaced > 0
    assert resumed_sparsifier.topology_updates == sparsifier.topology_updates == 6
    assert pointers == [mask.data_ptr() for mask in resumed_sparsifier.masks.values()]
    # a state kept in memory is a copy: training on did not change it
    assert all(torch.equal(mask, loaded[2]["masks"][name]) for name, mask in in_memory["masks"].items())


def test_apply_to_zeroes_in_a_target_what_the_masks_zero_and_nothing_else():
    _, _, sparsifier = sparse_run("dst")
    target = network(5)
    expected = {name: value * sparsifier.masks.get(name, 1) for name, value in target.named_parameters()}
    sparsifier.apply_to(target)
    assert all(torch.equal(value, expected[name]) for name, value in target.named_parameters())


def test_excluded_submodules_stay_dense_and_do_not_count():
    encoder = nn.ModuleDict({"zs_mlp": network(), "predictor": nn.Linear(16, 40)})
    optimizer = torch.optim.AdamW(encoder.parameters())
    sparsifier = Sparsifier(encoder, optimizer, "sst", total_updates=1, exclude=["predictor"])
    assert zeros(sparsifier) == {"zs_mlp.0.weight": 41, "zs_mlp.3.weight": 177, "zs_mlp.6.weight": 0}
    assert (encoder["predictor"].weight != 0).all()


@pytest.mark.parametrize(
    ("module", "include", "expected"),
    [
        # (2, 4, 6), (3, 6), (2, 4), as in the first case of ER above: 55 / 84 of 48, 13 / 42 of 18
        (nn.Sequential(nn.Conv1d(4, 2, 6), nn.Linear(6, 3), nn.Linear(4, 2)), [], [31, 5, 0]),
        (nn.Conv2d(2, 8, 3), [], [72]),  # half of 8 * 2 * 3 * 3
        (nn.Conv3d(2, 8, 3, groups=2), [], [108]),  # half of 8 * 1 * 3 * 3 * 3
        # (48, 16), (16, 16): eps = 512 / 96, densities 64 eps / 768 and 32 eps / 256
        (nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}), ["in_proj_weight"], [426, 85]),
        # (64, 8), (64, 16): eps = 768 / 152, densities 72 eps / 512 and 80 eps / 1024
        (nn.LSTM(8, 16), ["weight_ih_l0", "weight_hh_l0"], [148, 619]),
    ],
)
def test_convolutions_and_included_parameters_are_masked_as_linear_weights_are(module, include, expected):
    _, _, sparsifier = sparse_run(net=module, sparsity=0.5, include=include)
    random_steps(sparsifier, 12)
    assert list(zeros(sparsifier).values()) == expected
    assert moved(sparsifier) == 0
    assert sparsifier.replaced > 0


def test_frozen_and_empty_layers_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16).requires_grad_(False), nn.Linear(0, 8), nn.Conv1d(0, 8, 1))
    _, _, sparsifier = sparse_run(net=net)
    random_steps(sparsifier, 5)
    assert list(sparsifier.masks) == ["0.weight"]
    assert (net[1].weight != 0).all()


def test_a_weight_has_one_sparsifier_at_a_time():
    net, optimizer, sparsifier = sparse_run("sst")
    before = net[3].weight.clone()
    with pytest.raises(ValueError, match=r"another Sparsifier masks \['3.weight'\]"):
        Sparsifier(net, optimizer, "dst", exclude=["0", "6"], total_updates=1, seed=1)
    assert torch.equal(net[3].weight, before)
    del sparsifier
    Sparsifier(net, optimizer, "dst", total_updates=1)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_names_are_those_without_wrappers_so_that_states_and_targets_fit(wrap):
    _, _, plain = sparse_run("sst", seed=7)
    _, _, sparsifier = sparse_run("sst", net=nn.DataParallel(wrap(network())))
    random_steps(sparsifier, 1)
    sparsifier.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="0.weight: .* outside"):  # the module's state was not loaded
        random_steps(sparsifier, 1)
    target = network()
    sparsifier.apply_to(target)
    assert torch.equal(target[3].weight == 0, ~plain.masks["3.weight"])
    assert list(sparse_run("sst", net=wrap(network()), exclude=["0"])[2].masks) == ["3.weight", "6.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net[3].reset_parameters(), r"3.weight: 177 weights outside .* call apply_to\(module\)"),
        (lambda net: net.load_state_dict(network(1).state_dict()), "0.weight: 41 weights outside the mask are not 0"),
        (lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True), "0.weight has left the module"),
        (lambda net: net.insert(3, nn.Linear(16, 16)).pop(4), "3.weight has left the module"),
        (lambda net: net[3].weight.data.fill_(math.nan), "3.weight holds NaN or inf"),
    ],
)
@pytest.mark.parametrize("regime", ["sst", "dst"])
@pytest.mark.parametrize("after", [0, 2])
def test_weights_changed_from_outside_are_noticed_and_apply_to_repairs_them(change, message, regime, after):
    net, _, sparsifier = sparse_run(regime)
    random_steps(sparsifier, after)
    change(net)
    with pytest.raises(ValueError, match=message):
        random_steps(sparsifier, 5)
    assert sparsifier.updates == (4 if after else 0)  # at the first step or the next multiple of 5, and before it
    if "outside" in message:
        sparsifier.apply_to(net)
        random_steps(sparsifier, 6)
        assert moved(sparsifier) == 0


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "sgd momentum", "rmsprop"])
def test_an_optimizer_made_anew_is_noticed_once_it_has_moved_a_dropped_weight_unless_assigned(name):
    net, optimizer, sparsifier = sparse_run(optimizer=name)
    train(net, optimizer, sparsifier, 5)
    optimizer = OPTIMIZERS[name](net.parameters())
    with pytest.raises(ValueError, match="assign sparsifier.optimizer"):
        train(net, optimizer, sparsifier, 10)
    assert sparsifier.updates == 14  # step 10 dropped weights whose moments another optimizer holds
    sparsifier.optimizer = optimizer
    sparsifier.apply_to(net)
    train(net, optimizer, sparsifier, 11)
    assert moved(sparsifier) == 0


@pytest.mark.parametrize("growth", ["rigl", "set"])
@pytest.mark.parametrize("where", ["3.weight", "4.bias"])  # any gradient that a GradScaler skips the step for
def test_a_topology_update_waits_for_finite_gradients(growth, where):
    net, _, sparsifier = sparse_run("d2s", growth=growth, schedule_start=0.0)
    random_steps(sparsifier, 4)
    before = zeros(sparsifier)
    for value in (math.inf, math.nan):
        net.get_parameter(where).grad[0] = value
        sparsifier.step()
        assert zeros(sparsifier) == before
        assert sparsifier.topology_update_due
    state = sparsifier.state_dict()
    random_steps(sparsifier, 1)
    # read at step 7: 0.6 * (1 - (1 - 7 / 32) ** 2) = 0.2338 of the module, so 0.2338 / 0.6 * 41.8 and * 177.2
    assert zeros(sparsifier) == {"0.weight": 16, "3.weight": 69, "6.weight": 0}
    assert not sparsifier.topology_update_due
    sparsifier.load_state_dict(state)
    assert sparsifier.topology_update_due


def test_a_diverged_run_waits_instead_of_blaming_its_weights():
    net, optimizer, sparsifier = sparse_run("dst")
    net[3].weight.data[0] = math.nan
    train(net, optimizer, sparsifier, 6)
    assert sparsifier.topology_updates == 0


class HostSyncs(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("regime", "expected"), [("dense", []), ("sst", [1, 5, 10]), ("dst", [1, 5, 10])])
def test_steps_between_the_checks_do_no_host_sync_and_compile_to_one_graph(regime, expected):
    net, _, sparsifier = sparse_run(regime)
    synced = []
    for step in range(1, 13):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        with HostSyncs() as syncs:
            sparsifier.step()
        synced += [step] * (syncs.n > 0)
    assert synced == expected
    torch.compile(sparsifier.step, backend="eager", fullgraph=True)()


def test_a_growth_rule_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(su.GROWTHS, "first", lambda free, n_grow, *_: free & (free.cumsum(1) <= n_grow))
    net, _, sparsifier = sparse_run("dst", net=nn.Sequential(nn.Linear(10, 1)), growth="first", sparsity=0.5)
    random_steps(sparsifier, 5)
    assert sparsifier.masks["0.weight"][0, :2].all()  # k = floor(0.481 * 5): the first of what is not kept


def test_step_sizes_of_rprop_are_no_moments():
    net = network()
    optimizer = torch.optim.Rprop(net.parameters(), 0.01)
    sparsifier = Sparsifier(net, optimizer, growth="set", update_interval=5, total_updates=40)
    random_steps(sparsifier, 4)
    before = {name: optimizer.state[weight]["step_size"].clone() for name, weight in sparsifier.weights.items()}
    sparsifier.step()
    assert sparsifier.replaced > 0
    assert all(torch.equal(optimizer.state[net.get_parameter(n)]["step_size"], sizes) for n, sizes in before.items())


def test_a_shared_weight_is_masked_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    module = nn.Sequential(first, second, first)
    sparsifier = Sparsifier(module, torch.optim.SGD(module.parameters()), "sst", 0.5, total_updates=1)
    assert zeros(sparsifier) == {"0.weight": 32}


def test_a_parameter_without_a_gradient_is_skipped():
    net, _, sparsifier = sparse_run("dst", update_interval=1)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    net[3].weight.grad = torch.ones(16, 16)
    sparsifier.step()
    assert net[0].weight.grad is None
    assert torch.equal(sparsifier.masks["0.weight"], before["0.weight"])
    assert not torch.equal(sparsifier.masks["3.weight"], before["3.weight"])


@pytest.mark.parametrize("shape", [(700, 1000), (3, 300_000), (1, 2**18)])  # several parts of 2^18 numbers, or one
def test_a_large_gradient_is_masked_to_its_last_row(shape):
    net = nn.Sequential(nn.Linear(shape[1], shape[0]))
    _, _, sparsifier = sparse_run("sst", net=net, distribution="uniform")
    gradient = torch.randn(shape, generator=generator())
    net[0].weight.grad = gradient.clone()
    sparsifier.step()
    assert torch.equal(net[0].weight.grad, torch.where(sparsifier.masks["0.weight"], gradient, 0.0))


def test_a_nan_gradient_outside_the_mask_stays_visible():
    net, _, sparsifier = sparse_run("sst")
    net[3].weight.grad = torch.full((16, 16), math.inf)
    sparsifier.step()
    assert net[3].weight.grad[~sparsifier.masks["3.weight"]].isnan().all()


def refused(message, **arguments):
    return pytest.param(arguments, message, id=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        refused("sparsity is 1.0", sparsity=1.0),
        refused("sparsity is -0.1", sparsity=-0.1),
        refused("unknown regime 'rigl': write one of dense, sst, dst, s2d, d2s", regime="rigl"),
        refused("unknown growth 'gradient': write one of rigl, set", growth="gradient"),
        refused("unknown distribution 'erk': write one of er, uniform", distribution="erk"),
        refused("update_interval=0", update_interval=0),
        refused("total_updates=0", total_updates=0),
        refused("drop fractions 1.5 and 0.0", drop_fraction=1.5),
        refused("drop fractions 0.5 and -1", final_drop_fraction=-1),
        refused("power=0", power=0),
        refused("schedule window 0.8 to 0.8", regime="d2s", schedule_start=0.8),
        refused("schedule window 0.0 to 500", regime="s2d", schedule_end=500),
        refused("exclude names no submodule ['predictor']", exclude=["predictor"]),
        refused("include names no parameter ['in_proj_weight']", include=["in_proj_weight"]),
        refused("no nn.Linear weights", exclude=["0", "3", "6"]),
        refused("do not fit the 352 weights", distribution="uniform-dense-output", sparsity=0.99),
    ],
)
def test_bad_arguments_are_refused_with_what_to_write(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        sparse_run(**arguments)


def test_modules_and_optimizers_that_cannot_work_are_refused():
    net, other = network(), network()
    with pytest.raises(ValueError, match=r"does not hold \['0.weight', '3.weight', '6.weight'\]"):
        sparse_run("sst", net=net)[2].optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(ValueError, match="no nn.Linear weights"):
        Sparsifier(nn.LayerNorm(3), torch.optim.AdamW(net.parameters()), total_updates=1)
    for optimizer in (torch.optim.Muon([net[0].weight]), type("Mine", (torch.optim.LBFGS,), {})(net.parameters())):
        with pytest.raises(ValueError, match="(Muon|Mine) is not element-wise"):
            Sparsifier(net, optimizer, total_updates=1)


def test_impossible_topology_updates_are_refused():
    weight, mask = torch.ones(4), torch.tensor([1, 1, 0, 0]).bool()
    for message, grad, counts, growth in (
        ("n_drop=3", weight, (3, 0), "rigl"),
        ("n_grow=4", weight, (1, 4), "rigl"),
        ("n_drop=-1", weight, (-1, 0), "rigl"),
        ("one shape", None, (1, 1), "rigl"),
        ("one shape", torch.ones(2, 2), (1, 1), "rigl"),
        ("unknown growth", weight, (1, 1), "random"),
        ("pass generator", None, (1, 1), "set"),
        ("NaN", weight * math.nan, (1, 1), "rigl"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_and_grow(weight, mask, grad, *counts, growth)
    with pytest.raises(ValueError, match="after backward"):
        sparse_run("dst", update_interval=1)[2].step()
    with pytest.raises(ValueError, match="end > start"):
        su.scheduled_sparsity(1, 0, 0.6, 10, 10)
    with pytest.raises(ValueError, match="at least 1"):
        su.drop_fraction(1, 0)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"regime": "sst"}, {}, "regime is 'sst' in the state, 'dst' here"),
        ({"growth": "set"}, {}, "growth is 'set' in the state"),
        ({"total_updates": 41}, {}, "total_updates is 41 in the state"),
        ({"sizes": (7, 16, 1)}, {"sizes": (6, 16, 1)}, r"mask of 0.weight has shape \(16, 7\) in the state, \(16, 6\)"),
        ({"sizes": (6, 16, 1)}, {"sizes": (6, 16, 1, 1)}, "mask of 6.weight has shape None in the state"),
        ({"sizes": (6, 16, 1, 1)}, {"sizes": (6, 16, 1)}, r"mask of 6.weight has shape \(1, 1\) in the state, None"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name_and_changes_nothing(saved, own, message):
    def build(sizes=(6, 16, 1), seed=0, **arguments):
        return sparse_run(net=network(sizes=sizes), seed=seed, **arguments)[2]

    sparsifier = build(**own)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(build(seed=1, **saved).state_dict())
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())


def test_apply_to_refuses_a_target_of_other_names_or_shapes_and_changes_nothing():
    _, _, sparsifier = sparse_run("sst")
    for target in (nn.Sequential(network()), network(sizes=(6, 16, 17, 1))):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=r"the target has no \d.weight of shape"):
            sparsifier.apply_to(target)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


# Diagnostics


@pytest.mark.parametrize(
    ("singular_values", "rank"),
    # 10 1 1 1: 12/13 is below 0.99. 98 1 1: 99/100 is exactly enough. 100 1: 100/101. 2^-i: 1 - 2^-7 is above 0.99
    [([10, 1, 1, 1], 4), ([98, 1, 1], 2), ([100, 1], 1), ([2.0**-i for i in range(20)], 7), ([0, 0], 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_rank_counts_the_singular_values_that_hold_99_percent(singular_values, rank, dtype):
    diagonal = torch.diag(torch.tensor(singular_values, dtype=torch.float64))
    assert su.stable_rank(diagonal.to(dtype)) == rank
    rows = torch.linalg.qr(torch.randn(64, len(singular_values), generator=generator(), dtype=torch.float64)).Q
    columns = torch.linalg.qr(torch.randn(30, len(singular_values), generator=generator(), dtype=torch.float64)).Q
    assert su.stable_rank((rows @ diagonal @ columns.T).to(dtype)) == rank  # (64, 30)


def test_stable_rank_of_a_single_direction_is_1_at_any_delta():
    assert su.stable_rank(torch.ones(256, 10), delta=0.01) == 1
    assert su.stable_rank(torch.eye(10), delta=0.5) == 5


def test_dormant_ratio_counts_units_below_tau_of_their_layers_mean():
    layer = torch.tensor([[0, -0.05, 1, 2.95], [0, 0.05, -1, 2.95]]) * 4  # mean |h| / 4: 0, 0.05, 1, 2.95, mean 1
    assert su.dormant_ratio([layer], tau=0.1) == 0.5
    assert su.dormant_ratio([layer], tau=0.025) == 0.25
    assert su.dormant_ratio([layer], tau=0.05) == 0.5  # equality counts
    assert su.dormant_ratio([torch.zeros(3, 5)]) == 1.0
    assert su.dormant_ratio([layer, torch.zeros(3, 4), torch.ones(3, 8)], tau=0.1) == 6 / 16  # pooled


def test_diagnostics_refuse_what_is_not_a_batch_of_units():
    with pytest.raises(ValueError, match="flatten"):
        su.stable_rank(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="flatten"):
        su.dormant_ratio([torch.zeros(3)])
    with pytest.raises(ValueError, match="no activations"):
        su.dormant_ratio([])
