"""Tests of sparse_utils.py. Expected numbers are worked out by hand or by brute force."""

import contextlib
import copy
import io
import itertools
import math
import re
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import sparse_utils as su
from sparse_utils import Sparsifier, prune_and_grow

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01, etas=(0.99, 1.01)),
    "zero": lambda p: ZeroRedundancyOptimizer(p, torch.optim.Adam),  # its state is elsewhere
}
same = partial(torch.testing.assert_close, rtol=0, atol=0)
Quantised = type("Quantised", (nn.Parameter,), {})
few = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0])  # so that there are many ties
HALF = torch.tensor([1.0, 2, 0, 0]), torch.tensor([True, True, False, False])  # weights and their mask


def cases(names, *values):
    return pytest.mark.parametrize(names, values)


def network(seed=0, sizes=(6, 16, 16, 1)):
    """An MLP with LayerNorm: masked weights are those of 0, 3, 6, ..."""
    torch.manual_seed(seed)
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.LayerNorm(m), nn.ELU())]
    return nn.Sequential(*layers[:-2])


def sparse_run(regime="dst", optimizer="adamw", net=None, **arguments):
    net = net or network()
    optimizer = OPTIMIZERS.get(optimizer, optimizer)(net.parameters())
    return net, optimizer, Sparsifier(net, optimizer, regime, **{"update_interval": 5, "total_updates": 40} | arguments)


def random_steps(sparsifier, n, optimizer=None):
    for _ in range(n):
        for parameter in sparsifier.module.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        sparsifier.step()
        (optimizer or sparsifier.optimizer).step()


def zeros(sparsifier):
    return [int((~mask).sum()) for mask in sparsifier.masks.values()]


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@cases(
    ("shapes", "sparsity", "expected"),
    ([(2, 4), (3, 6), (2, 4, 6)], 0.5, [0, 13 / 42, 55 / 84]),  # by hand
    ([(2, 4), (3, 6, 7), (7, 4)], 0.5, [0, 0.642857, 0]),  # two layers become dense
    ([(8, 6), (4, 3)], 0.7, [0.736111, 0.472222]),  # 33 + 8 zeros: each layer's share floored
    ([(512, 512)] * 3 + [(1, 512)], 0.6, [0.600389] * 3 + [0]),  # MR.Q's critic, and at scale 5
    ([(2560, 2560)] * 11 + [(1, 2560)], 0.6, [0.600021] * 11 + [0]),
    ([(512, 1536), (512, 512), (512, 512), (1, 512)], 0.6, [0.666861, 0.500292, 0.500292, 0]),
)
def test_erdos_renyi_gives_the_known_sparsities(shapes, sparsity, expected):
    sparsities = su.erdos_renyi_sparsities(dict(enumerate(shapes)), sparsity)
    assert list(sparsities.values()) == pytest.approx(expected, abs=1e-6)


def test_schedules_follow_equations_1_and_2_and_stay_at_their_ends():
    steps = (100, 250, 500, 750, 900)
    zetas = [su.drop_fraction(t, 1000, 0.3) for t in steps]
    assert zetas == pytest.approx([0.292658, 0.256066, 0.15, 0.043934, 0.007342], abs=1e-6)
    assert su.drop_fraction(1500, 1000, 0.5, 0.1) == pytest.approx(0.1)
    whole, window = ([su.scheduled_sparsity(t, 0, 0.6, *w) for t in steps] for w in ((0, 1000), (200, 800)))
    assert whole == pytest.approx([0.114, 0.2625, 0.45, 0.5625, 0.594], abs=1e-6)
    assert window == pytest.approx([0, 0.095833, 0.45, 0.595833, 0.6], abs=1e-6)


def test_a_random_mask_has_floor_of_its_share_in_zeros_and_is_uniform_over_positions():
    draws = torch.Generator().manual_seed(0)
    masks = [((30, 4), 0.5), ((30,), 0.1), ((100,), 0.29), ((100,), 0.57)]  # 0.29 * 100 is 28.99... in binary64
    assert [int(su.random_mask(*mask, draws).sum()) for mask in masks] == [60, 27, 100 - 28, 100 - 56]
    mean = torch.stack([su.random_mask((4, 5), 0.6, draws) for _ in range(2000)]).float().mean(0)
    assert (mean - 0.4).abs().max() < 0.05  # standard error 0.011


def test_a_rigl_update_gives_the_masks_worked_out_by_hand():
    weight, mask = torch.tensor([-9, 1, 4, -1, 5, 8, -2, 3]), torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool()
    for k, expected, new in (
        (1, [1, 0, 0, 1, 0, 1, 1, 0], [0]),
        (2, [1, 0, 0, 0, 1, 1, 1, 0], [0, 4]),
        (4, [1, 0, 1, 0, 1, 1, 0, 0], [0, 2, 4]),  # 5 is dropped and regrown
    ):
        new_mask, newly_grown = prune_and_grow(weight, mask, weight, k, k)
        assert (new_mask.int().tolist(), newly_grown.nonzero().flatten().tolist()) == (expected, new)


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(st.lists(st.tuples(few, few, st.booleans()), min_size=1, max_size=24), st.data())
def test_rigl_update_equals_a_brute_force_search_with_the_lowest_index_of_equal_ones_first(layer, data):
    weight, grad, mask = zip(*layer, strict=True)
    active = [i for i, m in enumerate(mask) if m]
    n_drop = data.draw(st.integers(0, len(active)))
    kept = set(active) - set(sorted(active, key=lambda i: (abs(weight[i]), i))[:n_drop])
    free = [i for i in range(len(mask)) if i not in kept]
    n_grow = data.draw(st.integers(0, len(free)))
    expected = kept | set(sorted(free, key=lambda i: (-abs(grad[i]), i))[:n_grow])
    new_mask, newly_grown = prune_and_grow(*(torch.tensor([x]) for x in (weight, mask, grad)), n_drop, n_grow)
    assert set(new_mask[0].nonzero().flatten().tolist()) == expected
    assert set(newly_grown[0].nonzero().flatten().tolist()) == expected - set(active)


def test_set_growth_reaches_every_connection_that_is_not_kept_just_dropped_ones_included():
    draws = torch.Generator()
    grown = torch.stack([prune_and_grow(*HALF, None, 1, 1, "set", draws)[0] for _ in range(900)])
    assert (grown.sum(1) == 2).all()
    same(grown.float().mean(0), torch.tensor([1 / 3, 1, 1 / 3, 1 / 3]), atol=0.07)  # standard error 0.016


@cases("optimizer", *list(OPTIMIZERS)[:-1])
@cases(("regime", "growth"), ("dst", "set"), *((r, "rigl") for r in ("sst", "dst", "d2s", "s2d")))
def test_an_update_moves_what_equations_1_and_2_ask_for_and_all_outside_the_mask_is_0(regime, growth, optimizer):
    arguments = {"distribution": "uniform", "sparsity": 0.5, "schedule_start": 0.0, "schedule_end": 1.0}
    net, optimizer, sparsifier = sparse_run(regime, optimizer, growth=growth, total_updates=20, **arguments)
    in_place = {name: mask.detach() for name, mask in sparsifier.masks.items()}
    for step in range(1, 26):
        optimizer.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        due, new, past = sparsifier.topology_update_due, 0, (1 - min(step, 20) / 20) ** 2
        assert due == (step % 5 == 0 and regime != "sst")
        now = {name: {"grad": w.grad, "weight": w, **optimizer.state[w]} for name, w in sparsifier.weights.items()}
        now = {name: {key: x.detach() for key, x in tensors.items()} for name, tensors in now.items()}
        (before, masks), draws = copy.deepcopy((now, sparsifier.masks)), sparsifier.generator.clone_state()
        sparsifier.step()
        for name, old in before.items():
            mask, active = masks[name], int(masks[name].sum())
            if due:
                share = {"dst": 0.5, "d2s": 0.5 - 0.5 * past, "s2d": 0.5 * past}[regime]  # eq. 2
                change = mask.numel() - math.floor(share * mask.numel()) - active
                k = math.floor(0.25 * (1 + math.cos(math.pi * min(step, 20) / 20)) * active)  # eq. 1
                counts = k + max(-change, 0), k + max(change, 0)
                mask, newly_grown = prune_and_grow(old["weight"], mask, old["grad"], *counts, growth, draws)
                new += int(newly_grown.sum())
            same([sparsifier.masks[name], in_place[name]], [mask, mask])
            same(now[name]["grad"], old["grad"] * mask)
            for key in old.keys() - {"grad", "step"}:  # of weight and moments, what regrows keeps its own
                same(now[name][key], old[key] * (masks[name] & mask | (key == "step_size")))  # of Rprop, no moment
        optimizer.step()
        assert not due or sparsifier.replaced == new / sum(int(mask.sum()) for mask in sparsifier.masks.values())
    assert sparsifier.topology_updates == (0 if regime == "sst" else 5)
    assert all(net.get_parameter(f"{i}.bias").abs().min() > 0 for i in (0, 3, 6))  # biases are not masked


@cases(
    ("regime", "arguments", "expected"),
    # eq. 2 for the (10, 10) layer at 0.6, read at steps 0, 10, ..., 100; zeros are floored
    ("d2s", {}, [0, 0, 0, 18, 33, 44, 53, 58, 60, 60, 60]),  # window 20..80; 0.6 - 0.15 is below 0.45 in binary64
    ("s2d", {}, [60, 48, 38, 29, 21, 15, 9, 5, 2, 0, 0]),  # window 0..100
    ("d2s", {"schedule_start": 0.0, "schedule_end": 0.5, "power": 1.0}, [0, 12, 24, 36, 48, *[60] * 6]),
    # dense to 0.9 in one update, where k = floor(0.488 * 100) is more than the 10 that stay
    ("d2s", {"sparsity": 0.9, "schedule_start": 0.0, "schedule_end": 0.1}, [0, *[90] * 10]),
)
def test_schedules_reach_the_count_of_equation_2_at_every_update(regime, arguments, expected):
    net, measured = network(sizes=(10, 10)), []
    _, _, sparsifier = sparse_run(regime, net=net, update_interval=10, total_updates=100, **arguments)
    for _ in range(101):
        measured += zeros(sparsifier)
        random_steps(sparsifier, 1)
    assert measured == [expected[step // 10] for step in range(101)]


@cases("optimizer", "adamw", "adamw fused", "sgd momentum")
@cases(("regime", "growth"), ("dst", "rigl"), ("dst", "set"), ("d2s", "rigl"), ("s2d", "set"))
def test_resuming_from_a_saved_state_continues_bit_for_bit(regime, growth, optimizer):
    saved = sparse_run(regime, optimizer, growth=growth)
    random_steps(saved[2], 13)
    torch.save([part.state_dict() for part in saved], file := io.BytesIO())
    torch.manual_seed(1)
    random_steps(saved[2], 20)
    resumed = sparse_run(regime, optimizer, growth=growth, net=network(9), seed=9)
    pointers = [mask.data_ptr() for mask in resumed[2].masks.values()]
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].check_due  # are module and optimizer loaded as well?
    torch.manual_seed(1)
    random_steps(resumed[2], 20)
    same([resumed[0].state_dict(), resumed[2].masks], [saved[0].state_dict(), saved[2].masks])
    assert resumed[2].statistics() == saved[2].statistics()
    assert pointers == [mask.data_ptr() for mask in resumed[2].masks.values()]


@cases(("number", "whole"), (np.float64, np.int64), (np.float32, np.float64), (torch.tensor, torch.tensor))
def test_settings_of_any_number_type_are_saved_as_plain_ones_and_equal(number, whole):
    values = {"sparsity": number(0.5), "drop_fraction": number(0.25), "update_interval": whole(5)}
    _, _, sparsifier = sparse_run(np.str_("d2s"), seed=np.int64(3), total_updates=whole(40), **values)
    expected = sparse_run("d2s", sparsity=0.5, drop_fraction=0.25, seed=3)[2].state_dict()
    assert str(sparsifier.state_dict()["settings"]) == str(expected["settings"])
    same(sparsifier.masks, expected["masks"])


@cases(
    ("module", "arguments", "expected"),
    # 57 + 153 + 9 zeros; the last is dense; eps = (149 - 16) / (22 + 32) = 2.463: 96 - 22 eps, 256 - 32 eps
    (network(), {"sparsity": 0.6}, [41, 177, 0]),
    (network(), {"distribution": "uniform"}, [48, 128, 8]),
    (network(sizes=(20, 20, 1)), {"sparsity": 0.6}, [252, 0]),  # 0.6 * 420, which binary64 must not turn into 251
    (nn.Sequential(nn.Conv1d(4, 2, 6), nn.Linear(6, 3), nn.Linear(4, 2)), {}, [31, 5, 0]),  # 55/84 of 48, 13/42 of 18
    (nn.Conv3d(2, 8, 3, groups=2), {}, [108]),  # half of 8 * 1 * 3 * 3 * 3
    # (48, 16), (16, 16): eps = 512 / 96, densities 64 eps / 768 and 32 eps / 256
    (nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}), {"include": ["in_proj_weight"]}, [426, 85]),
    # eps = (184 - 16) / 54: 96 - 22 eps, 256 - 32 eps
    (nn.ModuleDict({"a": network(), "predictor": nn.Linear(16, 40)}), {"exclude": ["predictor"]}, [27, 156, 0]),
    # a shared, a frozen and an empty one
    (nn.Sequential(*[nn.Linear(16, 16)] * 2, nn.Linear(16, 16).requires_grad_(False), nn.Linear(0, 8)), {}, [128]),
)
def test_linear_convolution_and_included_weights_have_floor_of_their_sparsities_in_zeros(module, arguments, expected):
    _, _, sparsifier = sparse_run(net=module, **{"sparsity": 0.5} | arguments)
    assert sparsifier.sparsity() == sum(expected) / sum(mask.numel() for mask in sparsifier.masks.values())
    random_steps(sparsifier, 12)
    assert zeros(sparsifier) == expected
    assert sparsifier.replaced > 0


@cases("wrap", torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
def test_names_are_those_without_outer_wrappers_so_that_states_and_targets_fit(wrap):
    _, _, plain = sparse_run("sst", seed=7)
    _, _, sparsifier = sparse_run("sst", net=nn.DataParallel(wrap(network())))
    sparsifier.load_state_dict(plain.state_dict())
    target = network(5)
    expected = {name: value * plain.masks.get(name, 1) for name, value in target.named_parameters()}
    sparsifier.apply_to(nn.DataParallel(target))
    same(dict(target.named_parameters()), expected)


@cases("name", "module", "_orig_mod")
def test_names_inside_a_module_are_left_as_they_are(name):
    net = nn.ModuleDict({"head": network(), "head2": nn.Linear(4, 4), name: nn.ModuleDict({"head": nn.Linear(4, 4)})})
    assert list(sparse_run("sst", net=net, exclude=["head"])[2].masks) == ["head2.weight", f"{name}.head.weight"]


@cases(
    ("change", "message", "built"),
    (lambda net: fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,))), "0.weight.* a DTensor", False),
    (lambda net: fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,))), "0.weight.* a DTensor", True),
    (lambda net: setattr(net[3], "weight", Quantised(torch.ones(16, 16))), "3.weight.* a Quantised", False),
    (lambda net: net[3].to("meta"), r"3.weight.* a Parameter \(torch.strided, meta", False),
    (lambda net: setattr(net[3], "weight", nn.Parameter(torch.ones(9))), "3.weight is flat", False),  # FSDP1's shards
    (lambda net: setattr(net[3].weight, "grad", torch.ones(16, 16).to_sparse()), "3.weight.*sparse_coo", True),
)
def test_what_is_no_ordinary_dense_tensor_is_refused_by_name_before_anything_changes(
    process_group, change, message, built
):
    net = network()
    sparsifier = sparse_run(net=net)[2] if built else None
    change(net)
    before = copy.deepcopy(list(net[:3].parameters()))
    with pytest.raises(ValueError, match=message):
        (sparsifier or sparse_run(net=net)[2]).step()
    assert all((x == y).all() for x, y in zip(net[:3].parameters(), before, strict=True))
    assert not built or sparsifier.updates == 0
    sparse_run("dense", net=net)[2].step()


@cases(
    ("change", "message"),
    (lambda net: net[3].reset_parameters(), r"3.weight: 177 weights outside .* call apply_to\(module\)"),
    (lambda net: net.load_state_dict(network(1).state_dict()), "0.weight: 41 weights outside the mask are not 0"),
    (lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True), "0.weight has left the module"),
    (lambda net: net[3].weight.data.fill_(math.nan), "3.weight holds NaN or inf"),
)
@cases(("regime", "after"), ("sst", 0), ("sst", 2), ("dst", 0), ("dst", 2))
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


def test_sparsity_counts_the_weights_outside_the_masks_that_are_in_fact_0():
    net, _, sparsifier = sparse_run("sst")
    net[0].weight.data[sparsifier.masks["0.weight"]] = 0  # active ones do not count
    assert sparsifier.sparsity() == 218 / 368  # 41 + 177 + 0
    net[3].reset_parameters()
    assert sparsifier.sparsity() == sparsifier.statistics()["sparsity"] == 41 / 368
    assert sparsifier.counts() == {"parameters": 465, "active_parameters": 465 - 41}  # 33 biases, 64 of LayerNorms
    assert sparsifier.coverage() == 368 / 465
    net.load_state_dict(network(1).state_dict(), assign=True)
    assert sparsifier.sparsity() == 0
    dense = sparse_run("dense")[2]
    assert (dense.masks, dense.sparsity(), dense.coverage()) == ({}, 0, 0)


@cases("name", "adamw", "adamw fused", "sgd momentum", "rmsprop", "zero")
def test_moments_that_are_not_zeroed_are_noticed_at_the_step_after_a_topology_update(process_group, name):
    net, _, sparsifier = sparse_run()
    optimizer = OPTIMIZERS[name](net.parameters())  # made anew
    random_steps(sparsifier, 5, optimizer=optimizer)
    moved = sum(int((net.get_parameter(n)[~mask] != 0).sum()) for n, mask in sparsifier.masks.items())
    assert (moved > 0, sparsifier.sparsity()) == (True, (218 - moved) / 368)
    with pytest.raises(ValueError, match="assign sparsifier.optimizer .*unlike ZeRO"):
        random_steps(sparsifier, 1, optimizer=optimizer)
    assert sparsifier.updates == 5
    sparsifier.optimizer = optimizer
    sparsifier.apply_to(net)
    with pytest.raises(ValueError, match="unlike ZeRO") if name == "zero" else contextlib.nullcontext():
        random_steps(sparsifier, 11)  # of which four check


@cases("growth", "rigl", "set")
@cases("where", "3.weight", "4.bias")  # any gradient that a GradScaler skips the step for
def test_a_topology_update_waits_for_finite_gradients(growth, where):
    net, _, sparsifier = sparse_run("d2s", growth=growth, schedule_start=0.0)
    random_steps(sparsifier, 4)
    before = zeros(sparsifier)
    for value in (math.inf, math.nan):
        net.get_parameter(where).grad[0] = value
        sparsifier.step()
        assert zeros(sparsifier) == before
        assert sparsifier.topology_update_due
    random_steps(sparsifier, 1)
    # read at step 7: 0.6 * (1 - (1 - 7 / 32) ** 2) = 0.2338 of the module, so 0.2338 / 0.6 * 41.8 and * 177.2
    assert zeros(sparsifier) == [16, 69, 0]
    assert not sparsifier.topology_update_due


@cases(("regime", "expected"), ("dense", []), ("sst", [1, 5, 10]), ("dst", [1, 5, 6, 10, 11]))
def test_steps_between_the_checks_do_no_host_sync_and_compile_to_one_graph(regime, expected):
    _, _, sparsifier = sparse_run(regime, "sgd momentum")  # AdamW does syncs
    due, synced = [], []
    for step in range(1, 13):
        due += [step] * sparsifier.check_due
        with torch.autograd.profiler.profile() as profile:
            random_steps(sparsifier, 1)
        ran = {event.name for event in profile.function_events}
        synced += [step] * (not ran.isdisjoint(["aten::_local_scalar_dense", "aten::nonzero"]))
    assert due == synced == expected
    torch.compile(sparsifier.step, backend="eager", fullgraph=True)()


def test_a_graph_is_replayed_only_where_no_sparsifier_reads_from_the_device(monkeypatch):
    for name in ("CUDAGraph", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    (net, _, sparsifier), called = sparse_run(), []
    run = su.graphed(lambda rb: called.append(random_steps(sparsifier, 1) or sparsifier.updates), net, [sparsifier], 0)
    for _ in range(17):
        run(MagicMock())
    assert called == [1, 2, 3, 5, 6, 10, 11, 15, 16]  # 3 is captured; 5, 10 and 15 change the topology


@cases("growth", "rigl", "set")
@cases("gradient", None, torch.zeros(16, 16))
def test_a_layer_that_a_step_does_not_train_is_left_alone(growth, gradient):
    net, _, sparsifier = sparse_run(growth=growth, update_interval=1)
    net[0].weight.grad, net[3].weight.grad = torch.ones(16, 6), gradient
    before, weight = copy.deepcopy(sparsifier.masks), net[3].weight.clone()
    sparsifier.step()
    changed = [name for name, mask in sparsifier.masks.items() if not torch.equal(mask, before[name])]
    assert (changed, torch.equal(net[3].weight, weight)) == (["0.weight"], True)


def test_set_needs_no_gradient():
    _, _, sparsifier = sparse_run(growth="set", update_interval=1)
    before = copy.deepcopy(sparsifier.masks)
    sparsifier.step()
    assert [torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items()] == [False, False, True]  # dense


def test_a_large_gradient_is_masked_to_its_last_row_and_inf_outside_stays_visible_as_nan():
    net, _, sparsifier = sparse_run("sst", net=network(sizes=(1000, 700)))  # more than 2^18 numbers: several parts
    net[0].weight.grad = torch.full((700, 1000), math.inf)
    sparsifier.step()
    assert torch.equal(net[0].weight.grad.isnan(), ~sparsifier.masks["0.weight"])


def load(**other):
    sparse_run()[2].load_state_dict(sparse_run(**other)[2].state_dict())


@cases(
    ("call", "message"),
    (lambda: sparse_run(sparsity=1.0), "sparsity is 1.0"),
    (lambda: sparse_run("rigl"), "unknown regime 'rigl': write one of dense, sst, dst, s2d, d2s"),
    (lambda: sparse_run(update_interval=2.5), "update_interval=2.5: write a whole number, at least 1"),
    (lambda: sparse_run(drop_fraction=1.5), "drop fractions 1.5 and 0.0"),
    (lambda: sparse_run(power=math.nan), "power=nan"),
    (lambda: sparse_run("d2s", schedule_start=0.8), "schedule window 0.8 to 0.8"),
    (lambda: sparse_run(exclude=["predictor"]), "exclude names no module ['predictor']"),
    (lambda: sparse_run(net=nn.LSTM(2, 2), include=["ih_l0"]), "include names no parameter ['ih_l0']"),
    (lambda: sparse_run(exclude=["0", "3", "6"]), "no nn.Linear weights"),
    (lambda: sparse_run(optimizer=lambda p: torch.optim.AdamW([next(p)])), "not hold ['3.weight', '6.weight']"),
    (lambda: sparse_run(optimizer=type("Mine", (torch.optim.LBFGS,), {})), "Mine is not element-wise"),
    (lambda: prune_and_grow(*HALF, torch.ones(4), 3, 0), "n_drop=3"),
    (lambda: prune_and_grow(*HALF, torch.full((4,), math.nan), 1, 1), "NaN"),
    (lambda: prune_and_grow(*HALF, None, 1, 1, "set"), "pass generator"),
    (lambda: sparse_run("dst", update_interval=1)[2].step(), "after backward"),
    (lambda: [sparse_run(net=twice) for twice in [network()] * 2], "another Sparsifier masks ['0.weight', "),
    (lambda: load(regime="sst"), "regime is 'sst' in the state, 'dst' here"),
    (lambda: load(net=network(sizes=(7, 16, 1))), "0.weight has shape (16, 7) in the state, (16, 6) here"),
    (lambda: sparse_run()[2].apply_to(nn.Sequential(network())), "the target has no 0.weight of shape (16, 6)"),
    (lambda: sparse_run()[2].apply_to(network(sizes=(6, 16, 2))), "the target has no 3.weight of shape (16, 16)"),
    (lambda: su.scheduled_sparsity(1, 0, 0.6, 10, 10), "end > start"),
)
def test_what_cannot_work_is_refused_with_what_to_write(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@cases(
    ("singular_values", "delta", "rank"),
    ([98, 1, 1], 0.01, 2),  # 99/100 is exactly enough
    ([100, 1], 0.01, 1),  # 100/101 is above 0.99
    ([2.0**-i for i in range(20)], 0.01, 7),  # 1 - 2^-7 is above 0.99
    ([0, 0], 0.01, 0),
    ([1] * 10, 0.5, 5),
)
def test_effective_rank_counts_the_singular_values_that_hold_all_but_delta(singular_values, delta, rank):
    rows, columns = (torch.linalg.qr(torch.randn(n, len(singular_values), dtype=torch.float64)).Q for n in (64, 30))
    features = rows @ torch.tensor(singular_values, dtype=torch.float64).diag() @ columns.T
    assert su.stable_rank(features, delta) == su.stable_rank(features.float(), delta) == rank


def test_dormant_ratio_counts_units_below_tau_of_their_layers_mean():
    layer = torch.tensor([[0, -0.05, 1, 2.95], [0, 0.05, -1, 2.95]]) * 4  # mean |h| / 4: 0, 0.05, 1, 2.95, mean 1
    assert [su.dormant_ratio([layer], tau) for tau in (0.1, 0.05, 0.025)] == [0.5, 0.5, 0.25]  # equality counts
    assert su.dormant_ratio([torch.zeros(3, 5)]) == 1.0
    assert su.dormant_ratio([layer, torch.zeros(3, 4), torch.ones(3, 8)], tau=0.1) == 6 / 16  # pooled
