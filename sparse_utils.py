"""Sparse training of any module's Linear and convolution weights: SST, DST (RigL or SET), S2D and D2S.

The training regimes of "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv
2510.12096, section 2.1 and appendix B.1; "eq." and "sec." below), to import or to copy: it needs torch alone.

    sparsifier = Sparsifier(critic, optimizer, regime="dst", sparsity=0.6, total_updates=500_000)
    ...
    loss.backward()
    sparsifier.step()  # after backward(), before gradient clipping and optimizer.step()
    optimizer.step()

A weight outside the mask is exactly 0, and so are its gradient and its optimizer state: nothing is multiplied in the
forward pass. Weights, masks and optimizer state are changed in place, as `torch.compile` and CUDA graphs need it.

Methods: RigL (Evci et al., arXiv 1911.11134), SET (Mocanu et al., Nature Communications 9:2383), gradual pruning
(Zhu & Gupta, arXiv 1710.01878), ER (SET), effective rank (Kumar et al., arXiv 2010.14498), dormant neurons (Sokar et
al., arXiv 2302.12902).
"""

import contextlib
import math
import operator
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
MASKED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
NOT_ELEMENT_WISE = {"LBFGS", "Muon", "Shampoo", "SOAP"}  # an update mixes a layer's weights: masked ones would move


# Layer-wise sparsities and schedules (sec. B.1.1 to B.1.3) ----------------------------------------------------------


def erdos_renyi_sparsities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi: the density of a layer is eps * (sum of its dimensions) / (product of its dimensions).

    The dimensions are those of the weight, a convolution's kernel included. eps is such that the layers hold as many
    zeros together as with `uniform_sparsities`, the sum of floor(sparsity * size). While the largest density would pass
    1, every layer at that maximum becomes dense and eps is solved again for the others. Source: the code of SET, RigL.
    """
    _check_sparsity(sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    scale = {name: Fraction(sum(shape), size[name]) for name, shape in shapes.items()}  # exact, as counts need it
    n_active = sum(n - math.floor(sparsity * n) for n in size.values())
    sparse = list(shapes)
    while sparse:
        n_dense = sum(size[name] for name in shapes if name not in sparse)
        eps = Fraction(n_active - n_dense, sum(sum(shapes[name]) for name in sparse))
        largest = max(scale[name] for name in sparse)
        if eps * largest <= 1:
            break
        sparse = [name for name in sparse if scale[name] < largest]
    return {name: float(1 - eps * scale[name]) if name in sparse else 0.0 for name in shapes}


def uniform_sparsities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Every layer has the sparsity of the whole, in [0, 1). Source: sec. B.1.1."""
    _check_sparsity(sparsity)
    return dict.fromkeys(shapes, sparsity)


DISTRIBUTIONS = {"er": erdos_renyi_sparsities, "uniform": uniform_sparsities}


def drop_fraction(step: int, total_steps: int, initial: float = 0.5, final: float = 0.0) -> float:
    """Eq. 1: zeta, the share of active connections that a topology update replaces. `final` after `total_steps`."""
    if total_steps <= 0:
        raise ValueError(f"total_steps is {total_steps}: write the planned number of steps, at least 1")
    return final + 0.5 * (initial - final) * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))


def scheduled_sparsity(step: float, initial: float, final: float, start: float, end: float, power: float = 2) -> float:
    """Eq. 2: the sparsity at `step`. `initial` up to `start`, `final` from `end` on, a polynomial between."""
    if end <= start:
        raise ValueError(f"the schedule ends at {end}, not after its start at {start}: write an end > start")
    if step <= start:
        return initial
    remaining = max(0.0, 1 - (step - start) / (end - start))
    return final + (initial - final) * remaining**power


# Masks (sec. B.1.2, algorithm 1) ------------------------------------------------------------------------------------


def random_mask(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """Boolean mask with exactly floor(sparsity * size) zeros, uniformly placed. On the generator's device."""
    _check_sparsity(sparsity)
    size = math.prod(shape)
    mask = torch.ones(size, dtype=torch.bool, device=generator.device)
    order = torch.randperm(size, generator=generator, device=generator.device)
    mask[order[: math.floor(sparsity * size)]] = False
    return mask.view(shape)


def grow_by_gradient(free: Tensor, n_grow: int, dense_grad: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """RigL: the `n_grow` connections of `free` with the largest |gradient|; equal ones: the lowest index first."""
    if dense_grad is None or dense_grad.shape != free.shape:
        raise ValueError("dense_grad must have one shape with mask: call step() after backward(), before zero_grad()")
    return _lowest(-dense_grad.abs(), free, n_grow)


def grow_at_random(free: Tensor, n_grow: int, dense_grad: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """SET: `n_grow` uniformly random connections of `free`."""
    if generator is None:
        raise ValueError('growth="set" draws random connections: pass generator=torch.Generator().manual_seed(seed)')
    indices = free.flatten().nonzero().squeeze(1)
    order = torch.randperm(indices.numel(), generator=generator, device=generator.device)
    grown = torch.zeros_like(free).flatten()
    grown[indices[order[:n_grow].to(free.device)]] = True
    return grown.view(free.shape)


GROWTHS = {"rigl": grow_by_gradient, "set": grow_at_random}  # a further rule: one such function and its entry here


@torch.no_grad()
def prune_and_grow(
    weight: Tensor, mask: Tensor, dense_grad: Tensor | None, n_drop: int, n_grow: int,
    growth: str = "rigl", generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One topology update of one layer: drop the smallest weights, then grow connections. Changes nothing in place.

    Drops the `n_drop` active weights of smallest magnitude; equal ones: the lowest index first. Then grows `n_grow` of
    those that are not kept, just-dropped ones included, by a rule of `GROWTHS`: "rigl" (algorithm 1) by `dense_grad`,
    the gradient of the unmasked weight, or "set" with the random `generator`. `weight`, the boolean `mask` (True where
    active) and `dense_grad` have the same shape.

    Returns (new_mask, newly_grown), booleans of that shape. `newly_grown` marks what `mask` did not hold: nothing that
    was dropped and regrown. Raises ValueError for unequal shapes, counts out of range and NaN in the scores.
    """
    _choice("growth", growth, GROWTHS)
    n_active = int(mask.count_nonzero())
    n_free = mask.numel() - n_active + n_drop  # everything not kept
    if not (0 <= n_drop <= n_active and 0 <= n_grow <= n_free):
        raise ValueError(f"n_drop={n_drop}, n_grow={n_grow}: write at most {n_active} and {n_free}, and at least 0")
    if weight.shape != mask.shape:
        raise ValueError("weight and mask must have one shape")
    kept = mask & ~_lowest(weight.abs(), mask, n_drop)
    grown = GROWTHS[growth](~kept, n_grow, dense_grad, generator)
    return kept | grown, grown & ~mask


def _lowest(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Boolean mask of the `k` candidates with the lowest score; equal scores: the lowest index first."""
    chosen = torch.zeros_like(candidates)
    if k == 0:
        return chosen
    values = scores[candidates]  # in index order
    if values.isnan().any():
        raise ValueError("NaN in the weights or gradients to rank: skip step() when the loss is not finite")
    # The k-th lowest score and a pass over its ties, in a third of the time of a stable sort with the same result
    threshold = values.topk(k, largest=False, sorted=False).values.amax()
    lowest = values < threshold
    ties = (values == threshold).nonzero().squeeze(1)
    lowest[ties[: k - int(lowest.count_nonzero())]] = True
    return chosen.masked_scatter_(candidates, lowest)


# The training loop's side -------------------------------------------------------------------------------------------


class Sparsifier:
    """Sparse training of the Linear and convolution weights of one module: masks them at once, then at every `step()`.

    Regimes: "dense" (does nothing), "sst" (static random mask), "dst" (constant sparsity, moving topology), "s2d"
    (`sparsity` -> 0) and "d2s" (0 -> `sparsity`). The last three update their topology every `update_interval` steps:
    floor(zeta * active) connections of a layer are dropped and as many grown, zeta by eq. 1; d2s drops and s2d grows
    as many more as the sparsity of eq. 2 asks for.

    Building it zeroes what its new random masks zero, in trained weights and optimizer state as well. To go on with a
    sparse module: build, then load the states of module, optimizer and sparsifier. Masks stay on the weights' device.

    Args:
        module: the weights of its `nn.Linear` and `nn.Conv1d/2d/3d` are masked, each once if shared. Biases, norms,
            reparametrized (`torch.nn.utils.parametrizations`), frozen and empty weights and all else stay dense.
        optimizer: any element-wise one of torch that holds these weights. What of its state has the shape of a weight
            (moments, momentum) is set to 0 where a connection is dropped or grown.
        sparsity: share of zeros in [0, 1), over the masked weights together. `distribution`, "er" or "uniform", says
            how the layers share it.
        growth: "rigl" (largest gradient) or "set" (random).
        update_interval: steps between topology updates. total_updates: planned number of `step()` calls.
        drop_fraction, final_drop_fraction: zeta of eq. 1 at the start and after `total_updates`, in [0, 1].
        seed: of masks and random growth, on any device. Modules of the same shapes get the same masks from one seed.
        include: names of further parameters, or ends of names: "in_proj_weight" is that of every attention.
        exclude: full names of submodules that stay dense.
        schedule_start, schedule_end: window of eq. 2 as fractions of `total_updates`, for "d2s" (default 0.2 to 0.8,
            Obando-Ceron et al. 2024) and "s2d" (default 0 to 1). power: its lambda.

    Attributes:
        masks: boolean tensors by parameter name, True where active; empty for "dense". Names are those of the module
            inside `torch.compile`, DataParallel, DDP or AveragedModel.
        optimizer: as above. Assign the new one wherever it is made anew.
        updates: the clock, number of steps so far. topology_updates: how many of them changed the topology.
        replaced: connections that the last topology update made active, of all active after it; 0.0 before the first.

    Raises ValueError for arguments out of range, a weight that has a Sparsifier already, a DTensor and its like.
    """

    SETTINGS = ("regime", "target_sparsity", "distribution", "growth", "update_interval", "initial_drop_fraction")
    SETTINGS += ("final_drop_fraction", "total_updates", "schedule_start", "schedule_end", "power")
    COUNTERS = ("updates", "topology_updates", "replaced", "pending")
    _of_weight = weakref.WeakValueDictionary()  # the living Sparsifiers by id of each weight that they mask

    @torch.no_grad()
    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, regime: str = "dst", sparsity: float = 0.6, *,
        distribution: str = "er", growth: str = "rigl", update_interval: int = 1000, total_updates: int,
        drop_fraction: float = 0.5, final_drop_fraction: float = 0.0, seed: int = 0,
        include: Sequence[str] = (), exclude: Sequence[str] = (),
        schedule_start: float | None = None, schedule_end: float | None = None, power: float = 2.0,
    ):  # fmt: skip
        self.regime = _choice("regime", regime, REGIMES)
        self.distribution = _choice("distribution", distribution, DISTRIBUTIONS)
        self.growth = _choice("growth", growth, GROWTHS)
        self.update_interval = _whole_number("update_interval", update_interval)
        self.total_updates = _whole_number("total_updates", total_updates)
        self.target_sparsity, self.power = float(sparsity), float(power)
        self.initial_drop_fraction, self.final_drop_fraction = float(drop_fraction), float(final_drop_fraction)
        start, end = (0.2, 0.8) if self.regime == "d2s" else (0.0, 1.0)
        start = self.schedule_start = float(start if schedule_start is None else schedule_start)
        end = self.schedule_end = float(end if schedule_end is None else schedule_end)
        _check_sparsity(self.target_sparsity)
        if not (0 <= drop_fraction <= 1 and 0 <= final_drop_fraction <= 1):
            raise ValueError(f"drop fractions {drop_fraction} and {final_drop_fraction}: write numbers in [0, 1]")
        if not power > 0:
            raise ValueError(f"power={power}: write a positive number (the paper's lambda is 2)")
        if not 0 <= start < end <= 1:
            raise ValueError(f"schedule window {start} to {end}: write 0 <= schedule_start < schedule_end <= 1")
        self.updates, self.topology_updates, self.replaced = 0, 0, 0.0
        self.pending = False  # a topology update waits for finite gradients
        self.checked = False  # the weights, since the masks changed or a state was loaded
        self.generator = torch.Generator().manual_seed(operator.index(seed))
        self.module, self.exclude = _unwrapped(module), tuple(f"{name}." for name in exclude)
        self.weights = _weights_to_mask(self.module, include, exclude)
        self.masks: dict[str, Tensor] = {}
        self.optimizer = optimizer
        if self.regime != "dense":
            self._mask_at_random()

    def _mask_at_random(self) -> None:
        taken = [name for name, weight in self.weights.items() if id(weight) in self._of_weight]
        if taken:
            raise ValueError(f"another Sparsifier masks {taken}: exclude them here, or delete that one first")
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        for name, shape in shapes.items():
            _check_ordinary(name, *self._tensors(name))
            if len(shape) == 1:
                raise ValueError(f"{name} is flat, like a bias or a shard of FSDP: mask none of these, and use DDP")
        self.layer_sparsities = DISTRIBUTIONS[self.distribution](shapes, self.target_sparsity)
        for name, weight in self.weights.items():
            mask = random_mask(shapes[name], self._layer_sparsity(name), self.generator)
            self.masks[name] = mask.to(weight.device)
            self._clear(name, keep=self.masks[name])
            self._of_weight[id(weight)] = self

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if NOT_ELEMENT_WISE & {base.__name__ for base in type(optimizer).__mro__}:
            raise ValueError(f"{type(optimizer).__name__} is not element-wise: write an optimizer that is, like AdamW")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, weight in self.weights.items() if id(weight) not in held]
        if missing:
            raise ValueError(f"the optimizer does not hold {missing}: build it from this module's parameters()")
        self._optimizer = optimizer

    @property
    def topology_update_due(self) -> bool:
        """Whether the next `step()` updates the topology, if the gradients are finite."""
        return self.regime in ("dst", "s2d", "d2s") and (self.pending or (self.updates + 1) % self.update_interval == 0)

    @property
    def check_due(self) -> bool:
        """Whether the next `step()` checks the weights. No other reads from the device or changes the topology."""
        return self.regime != "dense" and (not self.checked or (self.updates + 1) % self.update_interval == 0)

    @torch.no_grad()
    def step(self) -> None:
        """Advance the clock, update the topology if due, zero the gradients outside the masks. All in place.

        Call it after `backward()` and before clipping and `optimizer.step()`, once per optimizer step. A topology
        update reads the gradients as they are: they must come from this module's own loss alone. It waits for the next
        step with finite gradients in the whole optimizer. It leaves a layer alone whose gradient is None or all 0.

        At the first step, at multiples of `update_interval` and at the step after a topology update it checks the
        weights: ValueError, before anything changes, if one is not 0 outside its mask, is not finite, has left the
        module, or if it or its gradient is no ordinary dense tensor. Other steps do no host sync.
        """
        due = self.topology_update_due
        if self.check_due and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            self.checked = self._check()
        self.pending = due and not self.checked
        self.updates += 1
        if due and not self.pending:
            self._update_topology()
        for name, mask in self.masks.items():
            grad = self.weights[name].grad
            if grad is not None:
                _mask_(grad, mask)

    @torch.no_grad()
    def apply_to(self, target_module: nn.Module) -> None:
        """Zero in `target_module` what the masks zero, in place: for target networks after a Polyak update.

        On the own module it zeroes the optimizer's state as well: the repair after something else changed its weights.
        Raises ValueError if the target lacks a masked parameter or has it in another shape.
        """
        parameters = dict(_unwrapped(target_module).named_parameters())
        for name, mask in self.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ValueError(f"the target has no {name} of shape {tuple(mask.shape)}: pass a copy of the module")
            _check_ordinary(name, parameters[name])
        for name, mask in self.masks.items():
            _mask_(parameters[name], mask)
            if parameters[name] is self.weights[name]:
                self._clear(name, keep=mask)

    def sparsity(self) -> float:
        """Measured share of zeros: weights outside the masks that are in fact 0, among all masked; 0.0 for "dense"."""
        size = sum(mask.numel() for mask in self.masks.values())
        return self._zeros() / size if size else 0.0

    def statistics(self) -> dict[str, float]:
        """What is worth logging: measured sparsity, topology updates so far, share of connections the last replaced."""
        return {"sparsity": self.sparsity(), "topology_updates": self.topology_updates, "replaced": self.replaced}

    def counts(self) -> dict[str, int]:
        """Parameters of the module without the excluded submodules, and those of them that no mask zeroes."""
        size = sum(p.numel() for name, p in self.module.named_parameters() if not name.startswith(self.exclude))
        return {"parameters": size, "active_parameters": size - self._zeros()}

    def __str__(self) -> str:
        """For a table of modules."""
        size, active = self.counts().values()
        return f"{self.regime:>5} {size:>14,} parameters {active:>14,} active   sparsity {self.sparsity():.4f}"

    def coverage(self) -> float:
        """Share of the masked weights, zeros or not, among all parameters of the module; 0.0 for "dense"."""
        return sum(mask.numel() for mask in self.masks.values()) / sum(p.numel() for p in self.module.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that a resumed run needs beside module and optimizer; loads with `weights_only=True`."""
        return {
            "settings": {name: getattr(self, name) for name in self.SETTINGS},
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in self.COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, in place. Load module and optimizer as well: their zeros belong to these masks.

        Raises ValueError, and changes nothing, if `state` is of other settings, parameter names or shapes.
        """
        for name in self.SETTINGS:
            saved, own = state["settings"][name], getattr(self, name)
            if saved != own:
                raise ValueError(f"{name} is {saved!r} in the state, {own!r} here: build this one as the saved one was")
        for name in sorted(state["masks"].keys() | self.masks.keys()):
            saved, own = (tuple(m[name].shape) if name in m else None for m in (state["masks"], self.masks))
            if saved != own:
                raise ValueError(f"the mask of {name} has shape {saved} in the state, {own} here: load another state")
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
        self.generator.set_state(state["generator"].cpu())
        for name in self.COUNTERS:
            setattr(self, name, state.get(name, False))  # older states lack `pending`
        self.checked = False

    def _layer_sparsity(self, name: str) -> float:
        """A layer's target sparsity now: under a schedule, its share of the module's times eq. 2."""
        sparsity = self.layer_sparsities[name]
        if self.regime not in ("s2d", "d2s") or self.target_sparsity == 0:
            return sparsity
        initial, final = (0.0, self.target_sparsity) if self.regime == "d2s" else (self.target_sparsity, 0.0)
        start, end = self.schedule_start * self.total_updates, self.schedule_end * self.total_updates
        scheduled = scheduled_sparsity(self.updates, initial, final, start, end, self.power)
        # The layer's share first: where it is 1, floor() sees eq. 2 to the last bit.
        return sparsity if scheduled == self.target_sparsity else scheduled * (sparsity / self.target_sparsity)

    def _check(self) -> bool:
        """Whether the optimizer's gradients are finite, and if so, ValueError if a weight is not what it must be."""
        for name in self.masks:
            _check_ordinary(name, self.weights[name].grad, *self._tensors(name))
        grads = [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]
        if not all(grad.isfinite().all() for grad in grads if grad is not None and not grad.is_sparse):
            return False
        parameters = dict(self.module.named_parameters())
        for name, mask in self.masks.items():
            weight = self.weights[name]
            if not any(weight is parameter for parameter in parameters.values()):
                _check_ordinary(name, parameters.get(name))
                raise ValueError(f"{name} has left the module: build a new Sparsifier where a layer is replaced")
            if not weight.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf: load module and optimizer from before")
            moved = int(((weight != 0) & ~mask).count_nonzero())
            if moved:
                raise ValueError(
                    f"{name}: {moved} weights outside the mask are not 0: call apply_to(module) after resetting layers "
                    "or loading weights, assign sparsifier.optimizer where it is made anew, use an element-wise one "
                    "with its moments in its state and 0 for zero (unlike ZeRO's and 8-bit ones)"
                )
        return True

    @torch.no_grad()
    def _update_topology(self) -> None:
        """Algorithm 1 on every masked layer, with the counts of sec. B.1.3 for the regimes with a schedule."""
        zeta = drop_fraction(self.updates, self.total_updates, self.initial_drop_fraction, self.final_drop_fraction)
        grads = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        trained = [name for name, grad in grads.items() if grad.any()]
        if not trained and (self.growth == "set" or not grads):
            trained = list(self.masks)  # SET needs no gradient at all, and RigL's error says that there is none
        n_new = 0
        for name, mask in self.masks.items():
            weight = self.weights[name]
            active = int(mask.count_nonzero())
            target = weight.numel() - math.floor(self._layer_sparsity(name) * weight.numel())
            if name not in trained or active == target == weight.numel():
                continue  # dense before and after: all that is dropped would regrow
            k = min(math.floor(zeta * active), target)  # a layer cannot regrow more than it will hold
            n_drop, n_grow = k + max(active - target, 0), k + max(target - active, 0)
            scores = (weight, mask, weight.grad)
            new_mask, newly_grown = prune_and_grow(*scores, n_drop, n_grow, self.growth, self.generator)
            self._clear(name, keep=mask & new_mask)  # a newly grown weight starts at 0, without moments
            mask.copy_(new_mask)
            n_new += int(newly_grown.count_nonzero())
        self.checked = False  # an optimizer that keeps its state elsewhere goes on moving what was dropped
        self.topology_updates += 1
        self.replaced = n_new / sum(int(mask.count_nonzero()) for mask in self.masks.values())

    def _zeros(self) -> int:
        """Weights outside the masks that are in fact 0, in the module as it is now."""
        weights = self.weights | dict(self.module.named_parameters())
        return sum(int(((weights[name] == 0) & ~mask).count_nonzero()) for name, mask in self.masks.items())

    def _tensors(self, name: str) -> list[Tensor]:
        """A weight and what of its optimizer state has its shape (moments, momentum), but not Rprop's step sizes."""
        weight = self.weights[name]
        state = self.optimizer.state.get(weight, {})
        moments = [x for key, x in state.items() if torch.is_tensor(x) and key != "step_size"]
        return [weight, *(x for x in moments if x.shape == weight.shape)]

    def _clear(self, name: str, keep: Tensor) -> None:
        """Set a weight and its optimizer state to 0 outside `keep`."""
        for tensor in self._tensors(name):
            _mask_(tensor, keep)


def _mask_(tensor: Tensor, mask: Tensor) -> None:
    """Multiply by a boolean mask in place. A NaN or inf outside it becomes NaN, so that the caller's checks see it."""
    mask = mask.view(torch.uint8)  # as bytes: on a CPU less than half the time of a product with booleans
    rows = len(tensor)
    if tensor.device.type == "cpu":  # where torch copies the mask to floats: in parts that fit into the cache
        rows = max(1, 2**18 * rows // tensor.numel())
    for part, of_mask in zip(tensor.split(rows), mask.split(rows), strict=True):
        part.mul_(of_mask)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel, DDP and AveragedModel, so that all names are its own."""
    compiled = [name for name, _ in module.named_children()] == ["_orig_mod"]
    if compiled or isinstance(module, WRAPPERS):
        return _unwrapped(module._orig_mod if compiled else module.module)
    return module


def _weights_to_mask(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """What is masked, by name: weights of `MASKED_LAYERS` and included ones, but not excluded, frozen or empty ones."""
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if p.ndim]
    included = {wanted: {id(p) for name, p in named if f".{name}".endswith(f".{wanted}")} for wanted in include}
    excluded = {wanted: {id(p) for name, p in named if name.startswith(f"{wanted}.")} for wanted in exclude}
    for argument, what, found in (("include", "parameter", included), ("exclude", "module", excluded)):
        unknown = [wanted for wanted, ids in found.items() if not ids]
        if unknown:
            raise ValueError(f"{argument} names no {what} {unknown}: write names as in named_{what}s() in a list")
    layers = [layer for layer in module.modules() if isinstance(layer, MASKED_LAYERS)]
    chosen = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight"}
    chosen = chosen.union(*included.values()).difference(*excluded.values())
    weights = {n: p for n, p in module.named_parameters() if id(p) in chosen and p.requires_grad and p.numel()}
    if not weights:
        raise ValueError("the module has no nn.Linear weights and no convolutions to mask: name others with include=")
    return weights


def _check_ordinary(name: str, *tensors: Tensor | None) -> None:
    """ValueError where a product with a mask in place fails or means something else."""
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_meta):
            what = f"{name}, its gradient or optimizer state is a {type(x).__name__} ({x.layout}, {x.device})"
            raise ValueError(f"{what}: exclude it, or keep it from fully_shard(), quantisation, sparse=True and meta")


def _choice(what: str, value: str, choices: Collection[str]) -> str:
    """That one of `choices`: a plain string, whatever `value` is."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: write one of {', '.join(choices)}")
    return next(choice for choice in choices if choice == value)


def _whole_number(what: str, value: float) -> int:
    if not (value >= 1 and value % 1 == 0):
        raise ValueError(f"{what}={value}: write a whole number, at least 1")
    return int(value)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: write the share of zeros, in [0, 1), such as 0.6")


# Diagnostics (sec. 3) -----------------------------------------------------------------------------------------------


@torch.no_grad()
def stable_rank(features: Tensor, delta: float = 0.01) -> int:
    """Effective rank: how many of the largest singular values sum to at least 1 - delta of all. 0 if all are 0.

    `features`: (batch, units). The paper's SRank: Kumar et al. 2021, eq. 1. Not what others call the stable rank.
    """
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}: flatten them to (batch, units)")
    cumulative = torch.linalg.svdvals(features.double()).cpu().cumsum(0)  # largest first
    if cumulative[-1] == 0:
        return 0
    # Equality counts, and rounding in float32 features must not hide it.
    return 1 + int((cumulative < (1 - delta - 1e-6) * cumulative[-1]).sum())


@torch.no_grad()
def dormant_ratio(activations: Sequence[Tensor], tau: float = 0.1) -> float:
    """Fraction, in [0, 1], of the units whose mean |activation| is at most tau times the mean of their layer.

    `activations`: one (batch, units) tensor per layer, after the nonlinearity; units are pooled over layers, and those
    of a layer that is all 0 are dormant. Source: Sokar et al. 2023, definition 3.1.
    """
    if not activations:
        raise ValueError("no activations: pass one (batch, units) tensor per layer")
    dormant = units = 0
    for activation in activations:
        if activation.ndim != 2:
            raise ValueError(f"activations have shape {tuple(activation.shape)}: flatten them to (batch, units)")
        score = activation.abs().mean(0, dtype=torch.promote_types(activation.dtype, torch.float32))  # (units,)
        dormant += int((score <= tau * score.mean()).sum())
        units += score.numel()
    return dormant / units


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], kind: type[nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs of each module's layers of this `kind`, in the order in which they are computed meanwhile."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    layers = [(name, x) for name, module in modules.items() for x in module.modules() if isinstance(x, kind)]
    for name in modules.keys() - dict(layers).keys():
        raise ValueError(f"the {name} has no {kind.__name__}: name the class of its activations in diagnose()")
    hooks = [x.register_forward_hook(lambda *args, name=name: outputs[name].append(args[2])) for name, x in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def plasticity(
    modules: Mapping[str, nn.Module], features: Mapping[str, Tensor], hidden: Mapping[str, Sequence[Tensor]]
) -> dict[str, float]:
    """What the paper measures of each module (Figs. 3, 7 and 10). `features` and all of `hidden`: (batch, units)."""
    metrics = {}
    for name, module in modules.items():
        metrics[f"plasticity/{name}_srank"] = stable_rank(features[name])
        metrics[f"plasticity/{name}_dormant_ratio"] = dormant_ratio(hidden[name], tau=0.1)
        metrics[f"plasticity/{name}_dormant_ratio_0.025"] = dormant_ratio(hidden[name], tau=0.025)
        metrics[f"plasticity/{name}_feature_norm"] = features[name].norm(dim=1).mean().item()
        metrics[f"plasticity/{name}_weight_norm"] = nn.utils.get_total_norm(module.parameters()).item()
    return metrics


# CUDA graphs --------------------------------------------------------------------------------------------------------


def graphed(
    update: Callable, module: nn.Module, sparsifiers: Collection[Sparsifier], generator: torch.Generator
) -> Callable:
    """`update(rb)` as one CUDA graph. Its first two calls run eagerly, and those that a Sparsifier needs on the host.

    `update` trains parameters of `module`, calls `step()` of the `sparsifiers` once each, draws random numbers from
    `generator` and `rb.generator` alone and returns a dict of tensors. Call it on another stream than the default one:
    a graph is captured on the stream that warmed up.
    """
    graph, metrics, eager_calls = None, {}, 0

    def run(rb: Any) -> dict[str, Tensor]:
        nonlocal graph, metrics, eager_calls
        if eager_calls < 2 or any(sparsifier.check_due for sparsifier in sparsifiers):
            eager_calls, eager_metrics = eager_calls + 1, update(rb)
            module.zero_grad()  # or these gradients would stay in memory beside the graph's
            return eager_metrics
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            for each in (generator, rb.generator):
                graph.register_generator_state(each)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                metrics = update(rb)  # computes nothing yet, but advances the clocks of the sparsifiers
        else:
            for sparsifier in sparsifiers:
                sparsifier.updates += 1
        graph.replay()
        return metrics

    return run
