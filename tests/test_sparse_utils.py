"""Tests of sparse_utils.py. Expected numbers are worked out by hand or by brute force."""

import copy
import io
import itertools
import math
import re
from functools import partial
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
    "rprop": lambda p: torch.optim.Rprop(p, 0.01, etas=(0.99, 1.01)),
}
same = partial(torch.testing.assert_close, rtol=0, atol=0)
many = settings(derandomize=True, deadline=None, max_examples=100, database=None)


def network(seed=0, sizes=(6, 16, 16, 1)):
    """An MLP with LayerNorm: masked weights are those of 0, 3, 6, ..."""
    torch.manual_seed(seed)
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.LayerNorm(m), nn.ELU())]
    return nn.Sequential(*layers[:-2])


def sparse_run(regime="dst", optimizer="adamw", net=None, **arguments):
    net = net or network()
    arguments = {"update_interval": 5, "total_updates": 40} | arguments
    optimizer = OPTIMIZERS.get(optimizer, optimizer)(net.parameters())
    return net, optimizer, Sparsifier(net, optimizer, regime, **arguments)


def train(net, optimizer, sparsifier, steps, seed=0, after=lambda: None):
    data = torch.Generator().manual_seed(seed)
    n_in = net[0].in_features
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, n_in, generator=data)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        after()


def zeros(sparsifier):
    return [int((~mask).sum()) for mask in sparsifier.masks.values()]


def random_steps(sparsifier, n):
    for _ in range(n):
        for parameter in sparsifier.module.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        sparsifier.step()
        sparsifier.optimizer.step()


@pytest.mark.parametrize(
    ("shapes", "sparsity", "expected"),
    [
        ([(2, 4), (3, 6), (2, 4, 6)], 0.5, [0, 13 / 42, 55 / 84]),  # by hand
        ([(2, 4), (3, 6, 7), (7, 4)], 0.5, [0, 0.642857, 0]),  # two layers become dense
        ([(8, 6), (4, 3)], 0.7, [0.736111, 0.472222]),  # 33 + 8 zeros: each layer's share floored
        # MR.Q's critic at scale 1, and on 1,536 inputs: only the output is dense
        ([(512, 512)] * 3 + [(1, 512)], 0.6, [0.600389] * 3 + [0]),
        ([(512, 1536), (512, 512), (512, 512), (1, 512)], 0.6, [0.666861, 0.500292, 0.500292, 0]),
    ],
)
def test_erdos_renyi_gives_the_known_sparsities(shapes, sparsity, expected):
    sparsities = su.erdos_renyi_sparsities(dict(enumerate(shapes)), sparsity)
    assert list(sparsities.values()) == pytest.approx(expected, abs=1e-6)


@many
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.floats(0, 0.99))
def test_erdos_renyi_keeps_the_zeros_of_uniform_and_one_eps_for_all_layers_that_are_not_dense(shapes, sparsity):
    sparsities = su.erdos_renyi_sparsities(dict(enumerate(shapes)), sparsity)
    layers = [(sparsities[i], n, m) for i, (n, m) in enumerate(shapes)]
    n_zeros = sum(math.floor(sparsity * (n * m)) for n, m in shapes)
    assert sum(s * n * m for s, n, m in layers) == pytest.approx(n_zeros, abs=1e-6)
    eps = [(1 - s) * n * m / (n + m) for s, n, m in layers if s > 0]
    assert eps == pytest.approx(eps[:1] * len(eps))
    assert all(0 <= s < 1 for s in sparsities.values())


def test_uniform_with_dense_output_keeps_all_parallel_heads_dense_and_the_total():
    shapes = {"q1.hidden": (8, 8), "q1.output": (1, 8), "q2.hidden": (8, 8), "q2.output": (1, 8)}
    expected = 0.5 * 144 / 128  # the hidden layers hold 128 of 144 weights
    sparsities = su.uniform_dense_output(shapes, 0.5)
    assert sparsities == {"q1.hidden": expected, "q1.output": 0, "q2.hidden": expected, "q2.output": 0}
    square = su.uniform_dense_output({"a": (8, 8), "b": (8, 8)}, 0.25)
    assert square == {"a": 0.5, "b": 0}  # a square output is not taken for its hidden layers' head


def test_sparsity_schedule_follows_equation_2_and_is_clamped_outside_its_window():
    window = [su.scheduled_sparsity(t, 0, 0.6, 200, 800) for t in (100, 250, 500, 750, 900)]
    assert window == pytest.approx([0, 0.095833, 0.45, 0.595833, 0.6], abs=1e-6)
    assert su.scheduled_sparsity(500, 0.6, 0, 0, 1000) == pytest.approx(0.15)  # 0.6 * 0.5 ** 2
    assert su.scheduled_sparsity(500, 0, 0.8, 0, 1000, power=3) == pytest.approx(0.7)  # 0.8 - 0.8 * 0.5 ** 3


def test_drop_fraction_follows_equation_1_and_stays_at_its_final_value():
    values = [su.drop_fraction(t, 1000, 0.3, 0.0) for t in (100, 250, 500, 750, 900)]
    assert values == pytest.approx([0.292658, 0.256066, 0.15, 0.043934, 0.007342], abs=1e-6)
    assert su.drop_fraction(0, 1000) == 0.5
    assert su.drop_fraction(1500, 1000, 0.5, 0.1) == su.drop_fraction(1000, 1000, 0.5, 0.1) == pytest.approx(0.1)


def test_random_mask_is_uniform_over_positions():
    masks = torch.Generator().manual_seed(0)
    mean = torch.stack([su.random_mask((4, 5), 0.6, masks) for _ in range(2000)]).float().mean(0)
    assert (mean - 0.4).abs().max() < 0.05  # standard error 0.011


few = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0])  # so that there are many ties


@many
@given(st.lists(st.tuples(few, few, st.booleans()), min_size=1, max_size=24), st.data())
def test_rigl_update_equals_a_brute_force_search_with_the_lowest_index_of_equal_ones_first(layer, data):
    weight, grad, mask = zip(*layer, strict=True)
    active = [i for i, m in enumerate(mask) if m]
    n_drop = data.draw(st.integers(0, len(active)))
    kept = set(active) - set(sorted(active, key=lambda i: (abs(weight[i]), i))[:n_drop])
    free = [i for i in range(len(mask)) if i not in kept]
    n_grow = data.draw(st.integers(0, len(free)))
    expected = kept | set(sorted(free, key=lambda i: (-abs(grad[i]), i))[:n_grow])
    tensors = [torch.tensor([values]) for values in (weight, mask, grad)]  # (1, n)
    new_mask, newly_grown = prune_and_grow(*tensors, n_drop, n_grow)
    assert new_mask.shape == newly_grown.shape == tensors[0].shape
    assert set(new_mask[0].nonzero().flatten().tolist()) == expected
    assert set(newly_grown[0].nonzero().flatten().tolist()) == expected - set(active)


def test_set_growth_reaches_every_connection_that_is_not_kept_just_dropped_ones_included():
    weight, mask, draws = torch.tensor([1.0, 2, 0, 0]), torch.tensor([1, 1, 0, 0]).bool(), torch.Generator()
    grown = torch.stack([prune_and_grow(weight, mask, None, 1, 1, "set", draws)[0] for _ in range(900)])
    frequency = grown.float().mean(0)
    assert (grown.sum(1) == 2).all()
    assert frequency[1] == 1  # kept
    assert (frequency[[0, 2, 3]] - 1 / 3).abs().max() < 0.07  # standard error 0.016


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("regime", "growth"), [("dst", "set"), *((r, "rigl") for r in ("sst", "dst", "d2s", "s2d"))])
def test_weight_gradient_and_optimizer_state_are_zero_outside_the_mask_and_in_place(regime, growth, optimizer):
    net, optimizer, sparsifier = sparse_run(regime, optimizer, growth=growth)
    first, pointers = copy.deepcopy(sparsifier.masks), {}

    def check():
        for name, mask in sparsifier.masks.items():
            weight = net.get_parameter(name)
            tensors = {key: s for key, s in optimizer.state[weight].items() if torch.is_tensor(s) and s.ndim}
            # Rprop's step sizes are no moments: they stay above 0.01 * 0.99 ** 40
            assert (tensors.pop("step_size", torch.ones(())) > 0.006).all()
            assert tensors
            tensors |= {"weight": weight, "grad": weight.grad}
            assert all((tensor[~mask] == 0).all() for tensor in tensors.values())
            now = [tensor.data_ptr() for key, tensor in (tensors | {"mask": mask}).items() if key != "grad"]
            assert pointers.setdefault(name, now) == now

    train(net, optimizer, sparsifier, 40, after=check)
    assert (regime == "sst") == all(torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    assert sparsifier.topology_updates == (0 if regime == "sst" else 8)  # 40 updates, one in 5
    assert all(net.get_parameter(f"{i}.bias").abs().min() > 0 for i in (0, 3, 6))  # biases are not masked


@pytest.mark.parametrize(
    ("sizes", "distribution", "sparsity", "expected", "coverage"),
    [
        # 57 + 153 + 9 zeros; the last is dense; eps = (149 - 16) / (22 + 32) = 2.463: 96 - 22 eps, 256 - 32 eps
        ((6, 16, 16, 1), "er", 0.6, [41, 177, 0], 368 / 465),
        ((6, 16, 16, 1), "uniform", 0.5, [48, 128, 8], 368 / 465),  # 33 biases, two LayerNorms of 16 + 16
        # 184 of 352, so 50.2 of 96 and 133.8 of 256
        ((6, 16, 16, 1), "uniform-dense-output", 0.5, [50, 133, 0], 368 / 465),
        ((20, 20, 1), "er", 0.6, [252, 0], 420 / 481),  # 0.6 * 420, which binary64 must not turn into 251
    ],
)
def test_masks_have_floor_of_each_layers_sparsity_in_zeros(sizes, distribution, sparsity, expected, coverage):
    _, _, sparsifier = sparse_run("sst", net=network(sizes=sizes), distribution=distribution, sparsity=sparsity)
    assert zeros(sparsifier) == expected
    assert sparsifier.sparsity() == sum(expected) / sum(mask.numel() for mask in sparsifier.masks.values())
    assert sparsifier.coverage() == coverage


def test_dst_replaces_the_share_of_equation_1_at_multiples_of_the_interval_and_keeps_what_regrows():
    net, optimizer, sparsifier = sparse_run("dst", distribution="uniform", sparsity=0.5, total_updates=20)
    counts, weights = zeros(sparsifier), sparsifier.weights.items()
    for step in range(1, 26):
        due = sparsifier.topology_update_due
        assert due == (step % 5 == 0)
        optimizer.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        now = {n: {"mask": sparsifier.masks[n], "grad": w.grad, "weight": w, **optimizer.state[w]} for n, w in weights}
        before = copy.deepcopy(now)
        sparsifier.step()
        zeta = 0.25 * (1 + math.cos(math.pi * min(step, 20) / 20))  # 0.427 0.25 0.073 0 0
        new = 0
        for name, old in before.items():
            k = math.floor(zeta * int(old["mask"].sum())) if due else 0
            mask, newly_grown = prune_and_grow(old["weight"], old["mask"], old["grad"], k, k)
            assert torch.equal(now[name]["mask"], mask)
            assert torch.equal(now[name]["grad"], old["grad"] * mask)
            for key in old.keys() - {"mask", "grad", "step"}:  # of weight and moments, what regrows keeps its own
                assert torch.equal(now[name][key], old[key] * (old["mask"] & mask))
            new += int(newly_grown.sum())
        if due:
            assert sparsifier.replaced == new / 184
            assert (new > 0) == (step < 20)
        optimizer.step()
    assert (sparsifier.updates, sparsifier.topology_updates) == (25, 5)
    assert zeros(sparsifier) == counts


@pytest.mark.parametrize(
    ("regime", "arguments", "expected"),
    # eq. 2 for the (10, 10) layer at 0.6, read at steps 0, 10, ..., 100; zeros are floored
    [
        ("d2s", {}, [0, 0, 0, 18, 33, 44, 53, 58, 60, 60, 60]),  # window 20..80; 0.6 - 0.15 is below 0.45 in binary64
        ("s2d", {}, [60, 48, 38, 29, 21, 15, 9, 5, 2, 0, 0]),  # window 0..100
        ("d2s", {"schedule_start": 0.0, "schedule_end": 0.5, "power": 1.0}, [0, 12, 24, 36, 48, *[60] * 6]),
        # dense to 0.9 in one update, where k = floor(0.488 * 100) is more than the 10 that stay
        ("d2s", {"sparsity": 0.9, "schedule_start": 0.0, "schedule_end": 0.1}, [0, *[90] * 10]),
    ],
)
@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_schedules_reach_the_count_of_equation_2_at_every_update(regime, arguments, expected, growth):
    arguments = arguments | {"update_interval": 10, "total_updates": 100, "growth": growth}
    net, optimizer, sparsifier = sparse_run(regime, net=network(sizes=(10, 10)), **arguments)
    measured = zeros(sparsifier)
    for _ in range(10):
        train(net, optimizer, sparsifier, 9)
        assert zeros(sparsifier) == measured[-1:]  # only at multiples of the interval
        train(net, optimizer, sparsifier, 1)
        measured += zeros(sparsifier)
    assert measured == expected


@pytest.mark.parametrize(
    ("regime", "zeros_of", "replaced"),
    [
        # 100 active, target 70, k = 50: drops the 80 smallest, grows the first 50 of these: none is new
        ("d2s", lambda active: [*range(50, 80)], 0.0),
        # 60 active, target 90, k = 30: drops the 30 smallest, grows the 40 with a gradient and the first 20 of these
        ("s2d", lambda active: active[20:30], 40 / 90),
    ],
)
def test_what_a_schedule_asks_for_comes_on_top_of_what_is_replaced(regime, zeros_of, replaced):
    layer = network(sizes=(10, 10))
    _, _, sparsifier = sparse_run(regime, net=layer, sparsity=0.4, total_updates=10, final_drop_fraction=0.5)
    mask = sparsifier.masks["0.weight"]
    active = mask.flatten().nonzero()[:, 0].tolist()
    layer[0].weight.data.copy_(torch.arange(1.0, 101).view(10, 10) * mask)
    for _ in range(5):  # to the topology update, at half of the schedule
        layer[0].weight.grad = (~mask).float()
        sparsifier.step()
    assert (~mask).flatten().nonzero()[:, 0].tolist() == zeros_of(active)
    assert sparsifier.replaced == replaced


def test_masks_depend_on_the_seed_alone():
    masks = [sparse_run("dst", net=network(i), seed=seed)[2].masks["3.weight"] for i, seed in ((0, 1), (5, 1), (0, 2))]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_mask_found_on_existing_optimizer_state_zeroes_it():
    net = network()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    train(net, optimizer, Mock(), 1)
    sparsifier = Sparsifier(net, optimizer, "sst", total_updates=10)
    mask, state = sparsifier.masks["3.weight"], optimizer.state[net[3].weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key] != 0, mask)


def test_dense_regime_counts_and_touches_nothing():
    net, _, sparsifier = sparse_run("dense", update_interval=1)
    net[3].weight.grad = torch.ones(16, 16)
    sparsifier.step()
    same(net.state_dict(), network().state_dict())
    assert (net[3].weight.grad == 1).all()
    assert (sparsifier.masks, sparsifier.updates, sparsifier.topology_updates) == ({}, 1, 0)
    assert sparsifier.sparsity() == sparsifier.coverage() == 0.0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw fused", "sgd momentum"])
@pytest.mark.parametrize(("regime", "growth"), [("dst", "rigl"), ("dst", "set"), ("d2s", "rigl"), ("s2d", "set")])
def test_resuming_from_a_saved_state_continues_bit_for_bit(regime, growth, optimizer):
    saved = _, _, sparsifier = sparse_run(regime, optimizer, growth=growth)
    train(*saved, 13)
    file, statistics, in_memory = io.BytesIO(), sparsifier.statistics(), sparsifier.state_dict()
    torch.save([part.state_dict() for part in saved], file)
    train(*saved, 20, seed=1)
    resumed = _, _, resumed_sparsifier = sparse_run(regime, optimizer, growth=growth, net=network(9), seed=9)
    pointers = [mask.data_ptr() for mask in resumed_sparsifier.masks.values()]
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for part, state in zip(resumed, loaded, strict=True):
        part.load_state_dict(state)
    assert resumed_sparsifier.updates == 13
    assert resumed_sparsifier.statistics() == statistics
    train(*resumed, 20, seed=1)
    same(resumed[0].state_dict(), saved[0].state_dict())
    same(resumed_sparsifier.masks, sparsifier.masks)
    assert resumed_sparsifier.statistics() == sparsifier.statistics()
    assert (sparsifier.topology_updates, sparsifier.replaced > 0) == (6, True)
    assert pointers == [mask.data_ptr() for mask in resumed_sparsifier.masks.values()]
    same(in_memory["masks"], loaded[2]["masks"])  # copies: training on did not change them


def with_shared_frozen_and_empty_layers():
    first, second, frozen = (nn.Linear(16, 16) for _ in range(3))
    second.weight = first.weight
    return nn.Sequential(first, second, first, frozen.requires_grad_(False), nn.Linear(0, 8), nn.Conv1d(0, 8, 1))


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        # (2, 4, 6), (3, 6), (2, 4), as in the first case of ER above: 55 / 84 of 48, 13 / 42 of 18
        (nn.Sequential(nn.Conv1d(4, 2, 6), nn.Linear(6, 3), nn.Linear(4, 2)), {}, [31, 5, 0]),
        (nn.Conv2d(2, 8, 3), {}, [72]),  # half of 8 * 2 * 3 * 3
        (nn.Conv3d(2, 8, 3, groups=2), {}, [108]),  # half of 8 * 1 * 3 * 3 * 3
        # (48, 16), (16, 16): eps = 512 / 96, densities 64 eps / 768 and 32 eps / 256
        (nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}), {"include": ["in_proj_weight"]}, [426, 85]),
        # (64, 8), (64, 16): eps = 768 / 152, densities 72 eps / 512 and 80 eps / 1024
        (nn.LSTM(8, 16), {"include": ["weight_ih_l0", "weight_hh_l0"]}, [148, 619]),
        # eps = (184 - 16) / 54: 96 - 22 eps, 256 - 32 eps
        (nn.ModuleDict({"a": network(), "predictor": nn.Linear(16, 40)}), {"exclude": ["predictor"]}, [27, 156, 0]),
        (with_shared_frozen_and_empty_layers(), {}, [128]),
    ],
)
def test_convolutions_and_included_parameters_are_masked_and_no_other_counts(module, arguments, expected):
    _, _, sparsifier = sparse_run(net=module, sparsity=0.5, **arguments)
    random_steps(sparsifier, 12)
    assert zeros(sparsifier) == expected
    assert sparsifier.replaced > 0


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
    target = network(5)
    expected = {name: value * plain.masks.get(name, 1) for name, value in target.named_parameters()}
    sparsifier.apply_to(target)
    same(dict(target.named_parameters()), expected)
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
        random_steps(sparsifier, 6)  # of which one checks


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
    train(net, optimizer, sparsifier, 11)  # of which two check


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
    assert zeros(sparsifier) == [16, 69, 0]
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
    _, _, sparsifier = sparse_run(regime, "sgd momentum")  # AdamW does syncs
    synced = []
    for step in range(1, 13):
        with HostSyncs() as syncs:
            random_steps(sparsifier, 1)
        synced += [step] * (syncs.n > 0)
    assert synced == expected
    torch.compile(sparsifier.step, backend="eager", fullgraph=True)()


def test_a_parameter_without_a_gradient_is_skipped():
    net, _, sparsifier = sparse_run("dst", update_interval=1)
    before = copy.deepcopy(sparsifier.masks)
    net[3].weight.grad = torch.ones(16, 16)
    sparsifier.step()
    changed = [name for name, mask in sparsifier.masks.items() if not torch.equal(mask, before[name])]
    assert changed == ["3.weight"]


@pytest.mark.parametrize("shape", [(700, 1000), (3, 300_000), (1, 2**18)])  # several parts of 2^18 numbers, or one
def test_a_large_gradient_is_masked_to_its_last_row_and_inf_outside_stays_visible_as_nan(shape):
    net = nn.Sequential(nn.Linear(shape[1], shape[0]))
    _, _, sparsifier = sparse_run("sst", net=net, distribution="uniform")
    gradient = torch.randn(shape)
    gradient[:, ::1000] = math.inf
    net[0].weight.grad = gradient.clone()
    sparsifier.step()
    same(net[0].weight.grad, gradient * sparsifier.masks["0.weight"], equal_nan=True)  # inf * 0 is NaN


update = partial(prune_and_grow, torch.ones(4), torch.tensor([1, 1, 0, 0]).bool())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_run(sparsity=1.0), "sparsity is 1.0"),
        (lambda: sparse_run(sparsity=-0.1), "sparsity is -0.1"),
        (lambda: sparse_run("rigl"), "unknown regime 'rigl': write one of dense, sst, dst, s2d, d2s"),
        (lambda: sparse_run(growth="gradient"), "unknown growth 'gradient': write one of rigl, set"),
        (lambda: sparse_run(distribution="erk"), "unknown distribution 'erk': write one of er, uniform"),
        (lambda: sparse_run(update_interval=0), "update_interval=0"),
        (lambda: sparse_run(total_updates=0), "total_updates=0"),
        (lambda: sparse_run(drop_fraction=1.5), "drop fractions 1.5 and 0.0"),
        (lambda: sparse_run(final_drop_fraction=-1), "drop fractions 0.5 and -1"),
        (lambda: sparse_run(power=0), "power=0"),
        (lambda: sparse_run("d2s", schedule_start=0.8), "schedule window 0.8 to 0.8"),
        (lambda: sparse_run("s2d", schedule_end=500), "schedule window 0.0 to 500"),
        (lambda: sparse_run(exclude=["predictor"]), "exclude names no submodule ['predictor']"),
        (lambda: sparse_run(include=["in_proj_weight"]), "include names no parameter ['in_proj_weight']"),
        (lambda: sparse_run(exclude=["0", "3", "6"]), "no nn.Linear weights"),
        (lambda: sparse_run(distribution="uniform-dense-output", sparsity=0.99), "do not fit the 352 weights"),
        (lambda: sparse_run(optimizer=lambda p: torch.optim.AdamW([next(p)])), "not hold ['3.weight', '6.weight']"),
        (lambda: sparse_run(optimizer=lambda p: torch.optim.Muon([next(p)])), "Muon is not element-wise"),
        (lambda: sparse_run(optimizer=type("Mine", (torch.optim.LBFGS,), {})), "Mine is not element-wise"),
        (lambda: update(torch.ones(4), 3, 0), "n_drop=3"),
        (lambda: update(torch.ones(4), 1, 4), "n_grow=4"),
        (lambda: update(torch.ones(4), -1, 0), "n_drop=-1"),
        (lambda: update(None, 1, 1), "one shape"),
        (lambda: update(torch.ones(2, 2), 1, 1), "one shape"),
        (lambda: update(torch.full((4,), math.nan), 1, 1), "NaN"),
        (lambda: update(torch.ones(4), 1, 1, "random"), "unknown growth"),
        (lambda: update(None, 1, 1, "set"), "pass generator"),
        (lambda: sparse_run("dst", update_interval=1)[2].step(), "after backward"),
        (lambda: su.scheduled_sparsity(1, 0, 0.6, 10, 10), "end > start"),
        (lambda: su.drop_fraction(1, 0), "at least 1"),
        (lambda: su.stable_rank(torch.zeros(2, 3, 4)), "flatten"),
        (lambda: su.dormant_ratio([torch.zeros(3)]), "flatten"),
        (lambda: su.dormant_ratio([]), "no activations"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"regime": "sst"}, "regime is 'sst' in the state, 'dst' here"),
        ({"net": network(sizes=(7, 16, 1))}, "mask of 0.weight has shape (16, 7) in the state, (16, 6) here"),
        ({"net": network(sizes=(6, 16))}, "mask of 3.weight has shape None in the state"),
        ({"net": network(sizes=(6, 16, 1, 1))}, "mask of 6.weight has shape (1, 1) in the state, None"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name_and_changes_nothing(saved, message):
    _, _, sparsifier = sparse_run(net=network(sizes=(6, 16, 1)))
    before = copy.deepcopy(sparsifier.masks)
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsifier.load_state_dict(sparse_run(seed=1, **{"net": network(1, (6, 16, 1)), **saved})[2].state_dict())
    same(sparsifier.masks, before)


def test_apply_to_refuses_a_target_of_other_names_or_shapes_and_changes_nothing():
    _, _, sparsifier = sparse_run("sst")
    for target in (nn.Sequential(network()), network(sizes=(6, 16, 17, 1))):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=r"the target has no \d.weight of shape"):
            sparsifier.apply_to(target)
        same(target.state_dict(), before)


@pytest.mark.parametrize(
    ("singular_values", "delta", "rank"),
    [
        ([10, 1, 1, 1], 0.01, 4),  # 12/13 is below 0.99
        ([98, 1, 1], 0.01, 2),  # 99/100 is exactly enough
        ([2.0**-i for i in range(20)], 0.01, 7),  # 1 - 2^-7 is above 0.99
        ([0, 0], 0.01, 0),
        ([1] * 10, 0.5, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_rank_counts_the_singular_values_that_hold_all_but_delta(singular_values, delta, rank, dtype):
    rows, columns = (torch.linalg.qr(torch.randn(n, len(singular_values), dtype=torch.float64)).Q for n in (64, 30))
    features = rows @ torch.tensor(singular_values, dtype=torch.float64).diag() @ columns.T
    assert su.stable_rank(features.to(dtype), delta) == rank


def test_dormant_ratio_counts_units_below_tau_of_their_layers_mean():
    layer = torch.tensor([[0, -0.05, 1, 2.95], [0, 0.05, -1, 2.95]]) * 4  # mean |h| / 4: 0, 0.05, 1, 2.95, mean 1
    assert su.dormant_ratio([layer], tau=0.1) == 0.5
    assert su.dormant_ratio([layer], tau=0.025) == 0.25
    assert su.dormant_ratio([layer], tau=0.05) == 0.5  # equality counts
    assert su.dormant_ratio([torch.zeros(3, 5)]) == 1.0
    assert su.dormant_ratio([layer, torch.zeros(3, 4), torch.ones(3, 8)], tau=0.1) == 6 / 16  # pooled
