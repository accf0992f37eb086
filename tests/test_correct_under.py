"""Everything a training loop does to an optimizer, for both paths of PSDASGD and PSSPS.

What a learning-rate-free optimizer owes its user, and the tests that fail without it (those without a file are here):

| A reference implementation and a fast one, equal step by step
|     test_a_fast_step_is_a_reference_step
|     test_thirty_fast_steps_end_where_thirty_reference_steps_end
|     test_the_number_of_threads_changes_no_bit
|     test_a_state_replaced_by_hand_counts
|     test_an_optimizer_whose_state_is_thrown_away_begins_again
|     test_what_the_fast_path_does_not_know_is_refused_in_one_sentence_or_done_by_the_reference
| All tensors at once; nothing recompiled from step to step
|     test_speed.py::test_ten_thousand_small_tensors_cost_little_more_than_with_fused_adamw
|     test_clients.py::test_a_loop_with_torch_compile_resumes_a_killed_run
| No number read back from the device in a step
|     test_a_step_reads_no_number_back
|     test_on_a_gpu_no_step_waits
|     test_speed.py::test_our_fast_steps_read_nothing_the_loops_one_number_and_the_peers_two_for_each_tensor
| Capture in a CUDA graph
|     test_a_step_captured_in_a_cuda_graph_is_a_step
| GradScaler, with skipped steps
|     test_a_grad_scaler_changes_nothing_and_its_skipped_steps_leave_every_bit
| DDP: the same scalars on every rank, and PS-SPS's loss reduced
|     test_distributed.py::test_ranks_follow_one_process_on_the_same_global_batch
|     test_distributed.py::test_the_loss_is_the_mean_over_ranks_and_not_finite_if_one_is_not
| FSDP2 and DTensor: sums over shards
|     test_distributed.py::test_rows_of_sharded_parameters_are_added_up_in_one_reduction_and_others_left_alone
|     test_distributed.py::test_ranks_follow_one_process_on_the_same_global_batch
|     test_distributed.py::test_a_run_goes_on_from_whole_states_in_one_process_and_from_one_process_on_shards
| Sparse gradients refused clearly; complex parameters work
|     test_sparse_gradients_are_refused_in_one_sentence
|     test_complex_parameters_are_pairs_of_real_ones
| Closure and `loss=`
|     test_a_closure_is_called_once_with_gradients_and_its_loss_comes_back
|     test_polyak.py::test_a_closure_and_a_loss_are_the_same_thing
|     test_polyak.py::test_a_closure_and_a_loss_together_are_refused
|     test_polyak.py::test_a_step_without_a_loss_says_what_to_do
| Groups with settings of their own; `add_param_group` in mid-run; frozen groups
|     test_every_group_decays_by_its_own_lr_and_weight_decay
|     test_every_group_steps_by_its_own_lr_momentum_and_epsilon
|     test_tensors_with_a_distance_of_their_own_do_not_notice_each_other
|     test_a_setting_changed_in_mid_run_counts_from_the_next_step
|     test_a_frozen_group_is_as_good_as_absent
|     test_a_group_may_be_frozen_and_thawed_in_mid_run
|     test_a_group_added_in_mid_run_is_one_whose_gradients_come_late
|     test_d_adaptation.py::test_groups_that_share_a_distance_share_beta_2
| Parameters without a gradient; a first gradient of zero; a schedule that starts at 0
|     test_without_any_gradient_nothing_happens
|     test_a_first_gradient_of_zero_moves_nothing_and_spoils_nothing
|     test_a_warm_up_from_zero_moves_nothing_at_first_and_spoils_nothing
|     test_d_adaptation.py::test_parameters_without_a_gradient_wait_and_join_late
|     test_polyak.py::test_a_parameter_without_gradient_stays_and_may_join_later
| Every schedule of torch
|     test_no_schedule_of_torch_is_missing
|     test_every_schedule_of_torch_does_what_its_numbers_set_by_hand_do
|     test_a_learning_rate_that_is_a_tensor_is_that_number
| Exact resume at any step in a new process; other devices; older versions; copies
|     test_a_run_stopped_at_any_step_ends_in_a_new_process_where_it_would_have_ended
|     test_a_run_begun_on_one_path_ends_on_the_other
|     test_a_sliced_run_goes_on_from_its_state_on_either_path
|     test_a_state_goes_on_on_another_device
|     test_a_loaded_state_keeps_its_precision_and_goes_where_its_parameter_is
|     test_a_state_from_version_0_1_0_goes_on_as_that_version_did
|     test_a_copy_goes_on_by_itself
|     test_a_state_loaded_twice_belongs_to_neither_nor_to_the_file
|     test_d_adaptation.py::test_a_run_taken_up_again_goes_on_bit_for_bit
| The gradient left untouched; accumulated and clipped gradients
|     test_the_gradient_stays_as_it_was
|     test_accumulated_gradients_are_one_gradient
|     test_a_gradient_clipped_in_place_is_the_gradient
|     test_one_common_factor_on_all_gradients_is_no_clipping
| Statistics in single precision for bfloat16 parameters; several precisions and devices
|     test_the_statistics_of_bfloat16_parameters_are_those_of_single_precision
|     test_parameters_of_several_precisions_go_in_one_optimizer
|     test_parameters_on_several_devices_go_in_one_optimizer
|     test_d_adaptation.py::test_half_precision_parameters_keep_float32_statistics
| The learning rate in force is shown
|     test_the_learning_rate_shown_is_the_one_taken
|     test_what_is_shown_is_read_back_only_where_it_is_used
|     test_d_adaptation.py::test_what_the_optimizer_shows
|     test_polyak.py::test_the_effective_learning_rate_has_the_stated_units
| Certificates of invariance
|     test_invariance.py::test_atlas
|     test_invariance.py::test_ours_are_exact_at_large_scales_in_float32
|     test_d_adaptation.py::test_row_1_the_loss_in_other_units
|     test_polyak.py::test_loss_scale_uniform_units_and_factors_of_alpha_change_nothing
| NaN and inf: the step is left out whole and counted
|     test_a_step_that_is_not_finite_might_as_well_not_have_been
|     test_a_loss_that_is_not_finite_is_a_step_that_was_not
|     test_polyak.py::test_a_gradient_whose_square_overflows_is_skipped_and_the_warning_points_here
| Maximize, hooks, names
|     test_to_maximize_is_to_minimize_the_negative
|     test_hooks_run_once_a_step_and_may_change_the_gradient
|     test_hooks_of_the_state_are_heard
|     test_names_are_shown_and_saved_and_change_no_bit
| Not, as elsewhere: one loss of zero pins the step at 0; a negative loss gives a negative step
|     test_one_loss_at_the_floor_or_below_gives_no_step_and_the_next_one_its_own
|     test_polyak.py::test_one_zero_loss_does_not_pin_the_step
|     test_polyak.py::test_a_loss_at_or_below_the_floor_gives_a_zero_step
| Not, as elsewhere: a step counter that goes 1, 3, 5
|     test_the_step_counter_counts_by_one
"""


import ast
import copy
import gzip
import io
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

from pslib import PSDASGD, PSSPS, ScaledSGD, scalings
from pslib.estimators import Fixed
from pslib.optimizers import ParameterScaled

TESTS = Path(__file__).parent

# Every kind that the fast path knows.  d0 of "model" is in the parameter's units: 1e-6, the default, would move too little to be seen.
KINDS = {
    "tensor": (PSDASGD, {}),
    "model": (PSDASGD, {"per": "model", "d0": 2.0**-8}),
    "units": (PSDASGD, {"units": "tensor"}),
    "polyak": (PSSPS, {"c": 0.5, "growth_rate": 2.0}),
}
EVERY = [pytest.param(kind, fused, id=f"{kind}-{'fused' if fused else 'reference'}") for kind in KINDS for fused in (False, True)]
BOTH = pytest.mark.parametrize(("kind", "fused"), EVERY)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(kind, params, fused=None, **settings):
    cls, own = KINDS[kind]
    return cls(params, fused=fused, **{**own, **settings})


def take(opt, loss=1.0):
    """One step; the loss goes to those who need it."""
    return opt.step(loss=loss) if isinstance(opt, PSSPS) else opt.step()


class Valley:
    """A noisy quadratic: `params`, and the loss of batch k at them."""

    def __init__(self, shapes=((3, 5), (7,), (2, 3, 4)), dtype=torch.float32, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        start, self.target = ([torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes] for _ in range(2))
        self.params = [nn.Parameter(x) for x in start]

    def loss(self, k=0):
        g = torch.Generator().manual_seed(1000 + k)
        total = 0.0
        for p, t in zip(self.params, self.target, strict=True):
            noise = 0.25 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(t)
            total = total + (p - t - noise).abs().square().sum() / 2 if p.requires_grad else total
        return total

    def backward(self, k=0):
        for p in self.params:
            p.grad = None
        loss = self.loss(k)
        loss.backward()
        return loss.detach()

    def train(self, opt, steps, start=0):
        for k in range(start, start + steps):
            take(opt, self.backward(k))
        return self

    @property
    def values(self):
        return [p.detach().clone() for p in self.params]


def same(a, b) -> bool:
    """Whether two nested values are equal bit for bit (nan equal to nan)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        return torch.equal(a[~a.isnan()], b[~b.isnan()])
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def state_of(opt):
    return copy.deepcopy([dict(opt.state[p]) if p in opt.state else {} for group in opt.param_groups for p in group["params"]])


def dead(shape=(4,), value=1.0, dtype=torch.float32):
    """A parameter whose gradient is zero: it only decays."""
    p = nn.Parameter(torch.full(shape, value, dtype=dtype))
    p.grad = torch.zeros_like(p)
    return p


# --- where each row is tested -----------------------------------------------------------------------

def rows():
    """The rows of the table above: [what, its tests as (file or "", name)]."""
    table = []
    for line in __doc__.splitlines():
        if line.startswith("|     "):
            table[-1][1].append(line[1:].strip().rpartition("::")[::2])
        elif line.startswith("|"):
            table.append((line, []))
    return table


def test_every_row_has_a_test_and_every_test_named_exists():
    known = {}
    for what, tests in rows():
        assert tests, what
        for file, name in tests:
            file = file or Path(__file__).name
            if file not in known:
                tree = ast.parse((TESTS / file).read_text())
                known[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in known[file], f"{file} has no {name}"
    named = {name for _, tests in rows() for file, name in tests if not file}
    assert {name for name in globals() if name.startswith("test_")} == {*named, "test_every_row_has_a_test_and_every_test_named_exists"}


# --- the two paths are one optimizer ----------------------------------------------------------------

def awkward(dtype, device="cpu"):
    """Parameters of every shape that a kernel's loop might get wrong, and the gradients of step k."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    filters = normal(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    params = [normal(), normal(1), normal(17), normal(0, 3), normal(1023), normal(33, 31), normal(4099), filters, normal(6, 5).t()]
    params = [nn.Parameter(p) for p in (*params, torch.zeros(5, dtype=dtype, device=device))]

    def gradients(k):
        # A part that stays, so that N grows, and noise; some not laid out as the parameter is.
        g.manual_seed(77)
        grads = [normal(*p.shape) + 0.5 * p.sign().to(p) for p in (q.detach() for q in params)]
        g.manual_seed(k)
        grads = [x + normal(*x.shape) for x in grads]
        grads[2] = normal(34)[::2]
        grads[5] = normal(31, 33).t()
        grads[9] = normal(1).expand(5)
        grads[8] = grads[8].contiguous()
        return grads

    return params, gradients


def groups_of(kind, params):
    """Four groups with settings of their own; for "model" they share β₂, and with units the fast path knows no ε."""
    return [
        {"params": params[:3], "lr": 0.5, "weight_decay": 0.01},
        {"params": params[3:6], "betas": (0.5, 0.98)},
        {"params": params[6:8], "eps": 0.0 if kind == "units" else 1e-3, "weight_decay": 0.1},
        {"params": params[8:]},
    ]


def seen(k, i):
    """Whether parameter i has a gradient in step k: some come late, some are frozen for a while."""
    return not (i == 4 and k < 3) and not (i == 6 and 5 <= k < 9) and not (i == 0 and k % 2)


def blocks_of(opt, params):
    """The parameters with state, block by block."""
    known = [p for p in params if opt.state.get(p)]
    return [known] if opt.per == "model" else [[p] for p in known]


def noise(opt, block, before, old, u):
    """How far N and δ of a block may be off after a step when every operation is off by u, relatively.

    N is a sum with signs: what counts is the size of its terms.  So is every coordinate of s.
    """
    beta3 = math.sqrt(opt.param_groups[0]["betas"][1])
    a_sq = terms = s_sq = s_size = 0.0
    for p in block:
        state = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()}
        group = next(g for g in opt.param_groups if any(p is q for q in g["params"]))
        alpha_sq = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
        s, s0 = state["weighted_grad_sum"], before[p].get("weighted_grad_sum", torch.zeros(())).double()
        alive = alpha_sq > 0
        a_sq += alpha_sq.sum().item()
        terms += 0.0 if p.grad is None else (p.grad.double() * (state["initial"] - old[p].double())).abs().sum().item()
        s_sq += (s.square() / alpha_sq)[alive].sum().item()
        s_size += ((s0.abs() + (s - s0).abs()).square() / alpha_sq)[alive].sum().item()
    if not s_sq:
        return 0.0, 0.0
    lr = max(g["lr"] for g in opt.param_groups)
    state, known = opt.state[block[0]], before[block[0]].get("distance_numerator", torch.zeros(()))
    of_n = u * (known.abs().item() + (1 - beta3) * lr * state["rate"].item() / a_sq * terms)
    return of_n, of_n / math.sqrt(a_sq * s_sq) + u * state["distance"].item() * (1 + math.sqrt(s_size / s_sq))


def shared(state):
    """The names of the state that both paths keep: not α², which the reference loop holds between refreshes, nor where δ began."""
    return state.keys() - {"alpha_sq", "first_distance"} - ({"unit"} if not bool(state.get("unit", 0) > 0) else set())


@ALL_KINDS
@DTYPES
@DEVICES
def test_a_fast_step_is_a_reference_step(kind, dtype, device):
    """Each of 30 steps from the same state with the same gradients: v bit for bit, the rest to a few roundings."""
    left, gradients = awkward(dtype, device)
    right = [nn.Parameter(p.detach().clone()) for p in left]
    reference, fast = make(kind, groups_of(kind, left), False), make(kind, groups_of(kind, right), True)
    # At most 16 roundings of eps/2 on each side, and float64 sums of at most 7,000 terms, each in an order of its own.
    u = 16 * torch.finfo(dtype).eps + 2 * 7000 * torch.finfo(torch.float64).eps

    def close(x, y, size, where):
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.isnan(), y.isnan()), where
        assert bool(((x - y).abs() <= size + torch.finfo(dtype).tiny).nan_to_num(1).all()), (where, x, y)

    for k in range(30):
        for i, (p, q, g) in enumerate(zip(left, right, gradients(k), strict=True)):
            p.grad, q.grad = (g.clone(), g) if seen(k, i) else (None, None)
        reference.param_groups[3]["lr"] = fast.param_groups[3]["lr"] = 1 / (1 + k)
        before, old = dict(zip(left, state_of(reference), strict=True)), {p: p.detach().clone() for p in left}
        loss = torch.tensor(3.0 / (k + 1), dtype=dtype)
        take(reference, loss), take(fast, loss)
        off = {}
        if kind != "polyak":
            off = {p: noise(reference, block, before, old, u) for block in blocks_of(reference, left) for p in block}
        for i, (p, q) in enumerate(zip(left, right, strict=True)):
            where = f"step {k}, parameter {i}"
            a, b = reference.state.get(p, {}), fast.state.get(q, {})
            assert shared(a) == shared(b), where
            if a:
                assert float(a["step"]) == float(b["step"]) and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]), where
                assert "initial" not in a or torch.equal(a["initial"], b["initial"]), where
                of_n, of_distance = off.get(p, (0.0, u * a["distance"].abs()))
                close(a["distance"], b["distance"], of_distance, where)
                if "distance_numerator" in a:
                    close(a["distance_numerator"], b["distance_numerator"], of_n, where)
            for name in shared(a) & {"rate", "polyak_bound", "initial_sq", "unit"}:
                close(a[name].double(), b[name].double(), u * a[name].abs(), (where, name))
            for name in a.keys() & {"exp_avg", "weighted_grad_sum"}:
                start = before[p].get(name, torch.zeros_like(a[name]))
                close(a[name], b[name], u * (start.abs() + (a[name] - start).abs()), (where, name))
            close(p.detach(), q.detach(), u * (old[p].abs() + (p.detach() - old[p]).abs()), where)
        fast.load_state_dict(copy.deepcopy(reference.state_dict()))
        for p, q in zip(left, right, strict=True):
            q.data = p.detach().clone()
    assert all(not torch.equal(p, q) for p, q in zip(left, awkward(dtype, device)[0], strict=True) if p.numel())


@ALL_KINDS
@DTYPES
@DEVICES
def test_thirty_fast_steps_end_where_thirty_reference_steps_end(kind, dtype, device):
    """Each path on its own, and every address changed on the way: a fast path that remembers addresses would write elsewhere."""
    ends = []
    for fused in (False, True):
        params, gradients = awkward(dtype, device)
        opt = make(kind, groups_of(kind, params), fused)
        for k in range(30):
            for i, (p, g) in enumerate(zip(params, gradients(k), strict=True)):
                p.grad = g if seen(k, i) else None
            take(opt, torch.tensor(3.0 / (k + 1), dtype=dtype))
            if k == 10:
                kept = [p.data for p in params]
                for p in params:
                    p.data = p.data.clone()
                left_alone = [p.clone() for p in kept]
            if k == 20:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert same(kept, left_alone)
        ends.append(([p.detach() for p in params], opt.distance, opt.effective_lr))
    (xs, *scalars), (ys, *others) = ends
    # 30 steps of the 16 roundings above make 30·8·eps; ten times that, because δ feeds what it is off by back into the steps.
    bound = 2400 * torch.finfo(dtype).eps
    for start, x, y in zip(awkward(dtype, device)[0], xs, ys, strict=True):
        assert bool(((x - y).abs() <= bound * (start.abs() + (x - start).abs())).all())
    for a, b in zip(scalars, others, strict=True):
        assert torch.allclose(a, b, rtol=bound, atol=0, equal_nan=True)



@ALL_KINDS
@DTYPES
def test_the_number_of_threads_changes_no_bit(kind, dtype):
    ends, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            g = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in ((300, 1001), (70001,), (3,))]
            opt = make(kind, params, True)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=g, dtype=dtype)
                take(opt)
            ends.append(([p.detach() for p in params], state_of(opt)))
    finally:
        torch.set_num_threads(threads)
    assert same(ends[0], ends[1]) and same(ends[1], ends[2])


@BOTH
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "weighted_grad_sum", "initial", "distance", "polyak_bound", "all"])
def test_a_state_replaced_by_hand_counts(kind, fused, name):
    """A path that remembers where a buffer was would go on with the old one (kept here, lest it be memory of somebody else's)."""
    ends, old = {}, []
    for replaced in (False, True):
        valley = Valley()
        opt = make(kind, valley.params, fused)
        valley.train(opt, 3)
        names = set(opt.state[valley.params[0]]) - {"step", "distance" if kind == "polyak" else ""}  # there δ is for show
        if name not in {*names, "all"}:
            return
        for state in opt.state.values():
            old.append(dict(state))
            for n in names if name == "all" else {name}:
                state[n] = state[n] * 2 if replaced and name != "all" else state[n].clone() if replaced else state[n]
        valley.train(opt, 2, 3)
        ends[replaced] = valley.values, state_of(opt)
    if name == "all":
        assert same(ends[False], ends[True])
    else:
        assert not any(map(torch.equal, ends[False][0], ends[True][0]))


@BOTH
def test_an_optimizer_whose_state_is_thrown_away_begins_again(kind, fused):
    valley, fresh = Valley(), Valley()
    opt = make(kind, valley.params, fused)
    valley.train(opt, 3)
    opt.state.clear()
    for p, q in zip(fresh.params, valley.params, strict=True):
        p.data.copy_(q)
    other = make(kind, fresh.params, fused)
    valley.train(opt, 3, 3), fresh.train(other, 3, 3)
    assert same(valley.values, fresh.values) and same(state_of(opt), state_of(other))


@pytest.mark.parametrize(("kind", "settings_", "param"), [
    ("tensor", {"scaling": "none"}, None), ("polyak", {"scaling": "rmsprop"}, None), ("tensor", {"units": "neuron"}, None),
    ("units", {"eps": 0.125}, None), ("model", {"scaling": scalings.Adam(refresh=2)}, None), ("polyak", {}, "gaps"),
], ids=["none", "rmsprop", "neuron", "units-eps", "refresh", "gaps"])
def test_what_the_fast_path_does_not_know_is_refused_in_one_sentence_or_done_by_the_reference(kind, settings_, param):
    """`fused=True` says why not and touches nothing; `fused=None` is then `fused=False`."""
    ends = []
    for fused in (True, None, False):
        valley = Valley([(3, 5), (8,)])
        if param:
            valley.params[1] = nn.Parameter(torch.arange(16.0)[::2])
        before = valley.values
        if fused:
            with pytest.raises(ValueError, match=r"^fused=True is not possible: [^\n]*\.$"):
                valley.train(make(kind, valley.params, fused, **settings_), 1)
            assert same(valley.values, before)
            continue
        opt = make(kind, valley.params, fused, **settings_)
        ends.append((valley.train(opt, 5).values, state_of(opt)))
        assert not any(map(torch.equal, before, valley.values))
    assert same(*ends)


class HostReads(TorchDispatchMode):
    """Counts what would make a GPU wait: tensors read as Python numbers or of a size that their values decide."""

    READS = frozenset({
        torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
    })

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


@BOTH
def test_a_step_reads_no_number_back(kind, fused):
    """The fast path none, also when it skips; the reference one, whether all is finite."""
    valley = Valley()
    opt = make(kind, valley.params, fused)
    valley.train(opt, 2)
    counts = []
    for k in range(3):
        loss = valley.backward(k)
        if k == 2 and fused:
            valley.params[0].grad[0, 0] = math.nan
        with HostReads() as reads:
            take(opt, loss)
        counts.append(reads.count)
    assert counts == [0, 0, 0] if fused else max(counts) == 1
    with HostReads() as reads:
        float(loss)
    assert reads.count == 1  # the counter counts


@BOTH
def test_what_is_shown_is_read_back_only_where_it_is_used(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused)
    valley.train(opt, 2)
    with HostReads() as reads:
        shown = [opt.effective_lr, opt.distance]
    assert reads.count == 0
    with HostReads() as reads:
        assert all(float(x[0]) > 0 for x in shown)
    assert reads.count == 2


# --- groups -----------------------------------------------------------------------------------------

@BOTH
def test_every_group_decays_by_its_own_lr_and_weight_decay(kind, fused):
    p, q, r = (dead(value=3.0) for _ in range(3))
    groups = [{"params": [p], "weight_decay": 0.5}, {"params": [q], "weight_decay": 0.25, "lr": 0.5}, {"params": [r], "lr": 0.25}]
    take(make(kind, groups, fused))
    assert [x[0].item() for x in (p, q, r)] == [1.5, 3 * (1 - 0.125), 3.0]


@BOTH
def test_every_group_steps_by_its_own_lr_momentum_and_epsilon(kind, fused):
    """Settings go with the parameter, whichever group comes first; in a block of two, a sum has no order."""
    one, two = {"lr": 0.5, "betas": (0.5, 0.98), "eps": 0.25, "weight_decay": 0.01}, {"lr": 1.0, "betas": (0.9, 0.98), "weight_decay": 0.1}
    if kind == "units":
        del one["eps"]

    def train(first, second, swapped=False):
        valley = Valley([(3, 5), (7,)])
        groups = [{"params": [valley.params[0]], **first}, {"params": [valley.params[1]], **second}]
        return valley.train(make(kind, groups[::-1] if swapped else groups, fused), 8).values

    plain = train(one, two)
    assert same(plain, train(one, two, swapped=True))
    for name in one:  # each of them matters, in each of the two places
        changed_first, changed_second = train({**one, name: two.get(name, 0.0)}, two), train(one, {**two, name: one[name]})
        assert not torch.equal(changed_first[0], plain[0]) and not torch.equal(changed_second[1], plain[1]), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "units"])
def test_tensors_with_a_distance_of_their_own_do_not_notice_each_other(kind, fused):
    settings_ = [{"lr": 0.5}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}, {"eps": 0.0 if kind == "units" else 0.1}]
    together, alone = Valley(), Valley()
    groups = [{"params": [p], **s} for p, s in zip(together.params, settings_, strict=True)]
    together.train(make(kind, groups, fused), 8)
    opts = [make(kind, [{"params": [p], **s}], fused) for p, s in zip(alone.params, settings_, strict=True)]
    for k in range(8):
        alone.backward(k)
        for opt in opts:
            opt.step()
    assert same(together.values, alone.values)


@BOTH
def test_a_setting_changed_in_mid_run_counts_from_the_next_step(kind, fused):
    for name, value in {"lr": 0.25, "weight_decay": 0.1, "betas": (0.5, 0.98), "eps": 0.5}.items():
        if kind == "units" and name == "eps":
            continue  # the fast path knows no ε with units
        changed, plain = Valley(), Valley()
        left, right = make(kind, changed.params, fused), make(kind, plain.params, fused)
        changed.train(left, 3), plain.train(right, 3)
        assert same(changed.values, plain.values)
        for group in left.param_groups:
            group[name] = value
        changed.train(left, 1, 3), plain.train(right, 1, 3)
        assert not same(changed.values, plain.values), name
        assert all((x - y).abs().max() < 0.5 for x, y in zip(changed.values, plain.values, strict=True))


@BOTH
def test_a_frozen_group_is_as_good_as_absent(kind, fused):
    with_, without = Valley(), Valley()
    frozen = [nn.Parameter(torch.ones(5), requires_grad=False), nn.Parameter(torch.zeros(2, 2), requires_grad=False)]
    left = make(kind, [{"params": frozen, "weight_decay": 0.5}, {"params": with_.params}], fused)
    right = make(kind, without.params, fused)
    with_.train(left, 6), without.train(right, 6)
    assert same(with_.values, without.values) and torch.equal(frozen[0], torch.ones(5)) and not frozen[1].any()
    assert not any(left.state.get(p) for p in frozen)


@BOTH
def test_a_group_may_be_frozen_and_thawed_in_mid_run(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused, weight_decay=0.1)
    for k in range(9):
        for p in valley.params[:2]:
            p.requires_grad_(not 3 <= k < 6)
        before = valley.values
        valley.train(opt, 1, k)
        stays = [torch.equal(p, q) for p, q in zip(before, valley.values, strict=True)]
        assert stays == [3 <= k < 6, 3 <= k < 6, False]
        assert [float(opt.state[p]["step"]) for p in valley.params] == [min(k + 1, 3) + max(0, k - 5)] * 2 + [k + 1]


@BOTH
def test_a_group_added_in_mid_run_is_one_whose_gradients_come_late(kind, fused):
    late, added = Valley(), Valley()
    settings_ = {"weight_decay": 0.1, "lr": 0.5}
    left = make(kind, [{"params": late.params[:2]}, {"params": late.params[2:], **settings_}], fused)
    right = make(kind, added.params[:2], fused)
    for k in range(8):
        for valley in (late, added):
            valley.params[2].requires_grad_(k >= 3)
        if k == 3:
            right.add_param_group({"params": added.params[2:], **settings_})
        late.train(left, 1, k), added.train(right, 1, k)
    assert same(late.values, added.values) and same(state_of(left), state_of(right))
    assert not torch.equal(late.params[2], Valley().params[2])


@BOTH
def test_without_any_gradient_nothing_happens(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused, weight_decay=0.5)
    assert take(opt) == (1.0 if kind == "polyak" else None)
    assert same(valley.values, Valley().values) and not any(opt.state.values()) and opt.effective_lr.isnan().all()
    valley.train(opt, 2)
    before, state = valley.values, state_of(opt)
    opt.zero_grad()
    take(opt)
    assert same(valley.values, before) and same(state_of(opt), state)


# --- first steps ------------------------------------------------------------------------------------

def learning(opt, first):
    """Whether the state is finite and the distance has grown since."""
    state = [x for s in opt.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    return all(torch.isfinite(x).all() for x in state) and bool((opt.distance > first).all())


@BOTH
def test_a_first_gradient_of_zero_moves_nothing_and_spoils_nothing(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused)
    for p in valley.params:
        p.grad = torch.zeros_like(p)
    take(opt)
    assert same(valley.values, Valley().values)
    before = valley.loss()
    valley.train(opt, 60)
    assert all(torch.isfinite(p).all() for p in valley.params) and valley.loss() < 0.7 * before
    assert learning(opt, torch.zeros(1))


@BOTH
def test_a_warm_up_from_zero_moves_nothing_at_first_and_spoils_nothing(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused, weight_decay=0.1)
    warm_up = lr_scheduler.LambdaLR(opt, lambda k: min(1.0, k / 10))
    before = valley.loss()
    for k in range(80):
        valley.train(opt, 1, k)
        if k == 0:
            assert same(valley.values, Valley().values) and (opt.effective_lr == 0).all()
            first = opt.distance
        warm_up.step()
    assert all(torch.isfinite(p).all() for p in valley.params) and valley.loss() < 0.8 * before
    assert learning(opt, first)


@BOTH
def test_the_step_counter_counts_by_one(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused)
    for k in range(5):
        valley.train(opt, 1, k)
        assert [float(s["step"]) for s in opt.state.values()] == [k + 1] * 3


# --- schedules --------------------------------------------------------------------------------------

SCHEDULES = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, [lambda k: 1 / (1 + k), lambda k: 0.5**k]),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda k: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.125, total_iters=6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.25, total_iters=4), lr_scheduler.ExponentialLR(opt, 0.7)], [4]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 4), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=12),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8, 2.0),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.05, anneal_epochs=5),
}


def test_no_schedule_of_torch_is_missing():
    assert {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} == SCHEDULES.keys(), "give the new one its arguments above"


@BOTH
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_torch_does_what_its_numbers_set_by_hand_do(name, kind, fused):
    """CyclicLR and OneCycleLR drive β₁ too.  The second group gives no lr of its own: the schedule finds the default."""

    def start():
        valley = Valley()
        return valley, make(kind, [{"params": valley.params[:1], "lr": 0.5}, {"params": valley.params[1:]}], fused)

    driven, opt = start()
    schedule, numbers = SCHEDULES[name](opt), []
    for k in range(12):
        numbers.append([(g["lr"], g["betas"]) for g in opt.param_groups])
        assert [lr for lr, _ in numbers[-1]] == schedule.get_last_lr()
        driven.train(opt, 1, k)
        if k < 11:
            schedule.step(*[1.0] * (name == "ReduceLROnPlateau"))
    by_hand, opt = start()
    for k, now in enumerate(numbers):
        for group, (lr, betas) in zip(opt.param_groups, now, strict=True):
            group["lr"], group["betas"] = lr, betas
        by_hand.train(opt, 1, k)
    assert same(driven.values, by_hand.values)
    constant, opt = start()
    constant.train(opt, 12)
    assert len({str(now) for now in numbers}) > 1 and not any(map(torch.equal, driven.values, constant.values))


@BOTH
def test_a_learning_rate_that_is_a_tensor_is_that_number(kind, fused):
    ends = []
    for lr in (0.5, torch.tensor(0.5)):
        valley = Valley()
        opt = make(kind, valley.params, fused, lr=lr, weight_decay=0.125)
        schedule = lr_scheduler.ExponentialLR(opt, 0.5)
        for k in range(5):
            valley.train(opt, 1, k)
            schedule.step()
        ends.append(valley.values)
    assert same(*ends)


# --- gradients that were worked on --------------------------------------------------------------------

@BOTH
def test_accumulated_gradients_are_one_gradient(kind, fused):
    """Four quarters of a batch, summed by backward: the whole batch, up to the roundings of its own sum."""
    x, y = (torch.randn(16, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 2))

    def train(parts):
        torch.manual_seed(0)
        model = nn.Linear(5, 2).double()
        opt = make(kind, model.parameters(), fused)
        for _ in range(20):
            opt.zero_grad()
            loss = 0.0
            for now in torch.arange(16).chunk(parts):
                part = (model(x[now]) - y[now]).square().mean() / parts
                part.backward()
                loss += part.detach()
            take(opt, loss)
        return [p.detach() for p in model.parameters()]

    for whole, summed in zip(train(1), train(4), strict=True):
        assert torch.allclose(whole, summed, rtol=1e-10)  # 20 steps, sums of 16 numbers, and what δ makes of it


@BOTH
def test_a_gradient_clipped_in_place_is_the_gradient(kind, fused):
    clipped, given, free = Valley(), Valley(), Valley()
    left, right, third = (make(kind, v.params, fused) for v in (clipped, given, free))
    for k in range(8):
        loss = clipped.backward(k)
        norm = nn.utils.clip_grad_norm_(clipped.params, 0.5 + k / 4)
        assert norm > 0.5 + k / 4
        take(left, loss)
        loss = given.backward(k)
        factor = ((0.5 + k / 4) / (torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in given.params])) + 1e-6)).clamp(max=1.0)
        for p in given.params:
            p.grad = p.grad * factor
        take(right, loss)
        free.train(third, 1, k)
    assert same(clipped.values, given.values) and not same(clipped.values, free.values)


@BOTH
def test_one_common_factor_on_all_gradients_is_no_clipping(kind, fused):
    """PS-DA-SGD does not notice it; Polyak's step, which divides the loss by the gradient, gets longer by 1/factor."""
    ends = []
    for factor in (1.0, 2.0**-3):
        valley = Valley()
        opt = make(kind, valley.params, fused, **({"d0": math.inf, "growth_rate": math.inf} if kind == "polyak" else {}))
        for k in range(1 if kind == "polyak" else 8):
            loss = valley.backward(k)
            for p in valley.params:
                p.grad.mul_(factor)
            take(opt, loss)
        ends.append((valley.values, opt.effective_lr))
    if kind == "polyak":
        assert torch.equal(ends[1][1], 8 * ends[0][1])
    else:
        assert same(ends[0], ends[1])


@BOTH
def test_the_gradient_stays_as_it_was(kind, fused):
    valley = Valley()
    settings_ = {} if kind == "polyak" else {"maximize": True}
    opt = make(kind, valley.params, fused, weight_decay=0.1, **settings_)
    for k in range(3):
        loss = valley.backward(k)
        grads = [p.grad for p in valley.params]
        copies = [g.clone() for g in grads]
        take(opt, loss)
        assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(valley.params, grads, copies, strict=True))


@BOTH
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_leave_every_bit(kind, fused, unscale):
    bad, scaled = {0, 4, 5}, Valley()
    opt = make(kind, scaled.params, fused, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    seen_scales = set()
    for k in range(10):
        opt.zero_grad()
        loss = scaled.loss(k)
        scaler.scale(loss).backward()
        seen_scales.add(scaler.get_scale())
        if k in bad:
            scaled.params[1].grad[2] = math.inf if k else math.nan
        if unscale:
            scaler.unscale_(opt)
        before, state = scaled.values, state_of(opt)
        scaler.step(opt, **({"loss": loss.detach()} if kind == "polyak" else {}))
        scaler.update()
        assert same(scaled.values, before) == same(state_of(opt), state) == (k in bad)
    plain = Valley()
    opt = make(kind, plain.params, fused, weight_decay=0.01)
    for k in sorted(set(range(10)) - bad):
        plain.train(opt, 1, k)
    assert same(scaled.values, plain.values) and len(seen_scales) > 2


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30], ids=["nan", "inf", "-inf", "its square"])
def test_a_step_that_is_not_finite_might_as_well_not_have_been(kind, fused, value):
    """Also the first one, and one that is not finite in one tensor only; the warning comes once."""
    valley, plain = Valley(), Valley()
    opt, other = make(kind, valley.params, fused, weight_decay=0.1), make(kind, plain.params, fused, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(6):
            if k in (0, 3, 4):
                loss = valley.backward(k)
                valley.params[k % 3].grad.view(-1)[-1] = value
                take(opt, loss)
            valley.train(opt, 1, k), plain.train(other, 1, k)
        assert int(opt.skipped_steps) == 3 and int(other.skipped_steps) == 0
    assert same(valley.values, plain.values) and same(state_of(opt), state_of(other))
    assert len([w for w in caught if "not finite" in str(w.message)]) <= 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_step_that_was_not(loss, fused):
    valley, plain = Valley(), Valley()
    opt, other = make("polyak", valley.params, fused), make("polyak", plain.params, fused)
    for k in range(4):
        valley.backward(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(loss=torch.tensor(loss))
        valley.train(opt, 1, k), plain.train(other, 1, k)
    assert int(opt.skipped_steps) == 4 and same(valley.values, plain.values) and same(state_of(opt), state_of(other))


@pytest.mark.parametrize("fused", [False, True])
def test_one_loss_at_the_floor_or_below_gives_no_step_and_the_next_one_its_own(fused):
    for floor in (0.0, -3.0):
        valley = Valley()
        opt = make("polyak", valley.params, fused, betas=(0.0, 0.98))
        valley.train(opt, 3)
        before, rate = valley.values, opt.effective_lr.item()
        valley.backward(3)
        opt.step(loss=floor)
        assert same(valley.values, before) and opt.effective_lr.item() == 0
        valley.train(opt, 1, 4)
        assert opt.effective_lr.item() > rate / 2 > 0


@BOTH
def test_sparse_gradients_are_refused_in_one_sentence(kind, fused):
    table = nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    opt = make(kind, table.parameters(), fused)
    loss = table(torch.tensor([1, 2])).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        take(opt, loss.detach())
    assert torch.equal(table.weight, before)


# --- kinds of numbers ---------------------------------------------------------------------------------

MIXED = (torch.float32, torch.float64, torch.bfloat16)


def mixed():
    """One parameter of each precision."""
    valleys = [Valley([(9,)], dtype, seed=i) for i, dtype in enumerate(MIXED)]
    return valleys, [p for v in valleys for p in v.params]


def mixed_steps(opt, valleys, steps=8):
    for k in range(steps):
        take(opt, sum(v.backward(k).double() for v in valleys))


@ALL_KINDS
@pytest.mark.parametrize("fused", [False, None])
def test_parameters_of_several_precisions_go_in_one_optimizer(kind, fused):
    valleys, params = mixed()
    opt = make(kind, params, fused)
    mixed_steps(opt, valleys)
    for p, dtype in zip(params, MIXED, strict=True):
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        state = opt.state[p]
        assert p.dtype == dtype and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == statistics
        assert {state[n].dtype for n in ("distance", "rate")} == {torch.float64}
    assert opt.distance.dtype == opt.effective_lr.dtype == torch.float64
    if kind in ("tensor", "units"):  # each has its own distance, and so does not notice the others
        for valley, start in zip(valleys, mixed()[0], strict=True):
            start.train(make(kind, start.params, fused), 8)
            assert same(start.values, valley.values)


@ALL_KINDS
@pytest.mark.parametrize("fused", [False, None])
def test_the_statistics_of_bfloat16_parameters_are_those_of_single_precision(kind, fused):
    """A single-precision copy at the same place, with the same gradients, has the same state and takes the same step, rounded.

    Beside it there is a parameter in double precision, with which "model" shares its distance.
    """
    valleys = [Valley(dtype=torch.bfloat16), Valley([(5,)], torch.float64)]
    half = [p for v in valleys for p in v.params]
    single = [nn.Parameter(p.detach().float() if p.dtype == torch.bfloat16 else p.detach().clone()) for p in half]
    left, right = make(kind, half, fused), make(kind, single, fused)
    for k in range(12):
        loss = sum(v.backward(k).double() for v in valleys)
        for p, q in zip(half, single, strict=True):
            q.data, q.grad = p.detach().clone().to(q.dtype), p.grad.to(q.dtype)
        take(left, loss), take(right, loss)
        for p, q in zip(half, single, strict=True):
            a, b = left.state[p], right.state[q]
            assert a.keys() == b.keys() and all(same(a[n], b[n]) for n in a if n != "initial"), {n for n in a if not same(a[n], b[n])}
            assert torch.equal(p, q.to(p.dtype))
    assert not any(map(torch.equal, half, Valley(dtype=torch.bfloat16).values))


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
def test_complex_parameters_are_pairs_of_real_ones(kind, dtype):
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, dtype=dtype, generator=g) for s in ((4, 3), (5,))]
    pairs = [nn.Parameter(torch.view_as_real(x).clone()) for x in start]
    numbers = [nn.Parameter(x.clone()) for x in start]
    left, right = make(kind, numbers, weight_decay=0.1), make(kind, pairs, False, weight_decay=0.1)
    for k in range(10):
        for p, q in zip(numbers, pairs, strict=True):
            q.grad = torch.randn(q.shape, dtype=q.dtype, generator=g) + q.detach()
            p.grad = torch.view_as_complex(q.grad.clone())
        take(left, 1 / (k + 1)), take(right, 1 / (k + 1))
    for p, q, x in zip(numbers, pairs, start, strict=True):
        if left.param_groups and not torch.equal(torch.view_as_real(p), q):
            # The fast path may have taken the one and not the other: 10 steps of 16 roundings, and δ on top.
            assert torch.allclose(torch.view_as_real(p), q, rtol=1e3 * torch.finfo(dtype).eps, atol=0)
        assert not torch.equal(p, x)
    saved = left.state_dict()
    again = make(kind, [nn.Parameter(p.detach().clone()) for p in numbers])
    again.load_state_dict(saved)
    assert same(state_of(left), state_of(again))


# --- calls ----------------------------------------------------------------------------------------------

@BOTH
def test_a_closure_is_called_once_with_gradients_and_its_loss_comes_back(kind, fused):
    closed, plain = Valley(), Valley()
    left, right = make(kind, closed.params, fused), make(kind, plain.params, fused)
    for k in range(5):
        calls = []

        def closure(k=k, calls=calls):
            calls.append(torch.is_grad_enabled())
            return closed.backward(k)

        with torch.no_grad():
            loss = left.step(closure)
        assert calls == [True] and torch.equal(loss, plain.loss(k).detach())
        plain.train(right, 1, k)
    assert same(closed.values, plain.values)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "model", "units"])
def test_to_maximize_is_to_minimize_the_negative(kind, fused):
    down, up, wrong = Valley(), Valley(), Valley()
    opts = [make(kind, v.params, fused, maximize=m, weight_decay=0.01) for v, m in ((down, False), (up, True), (wrong, False))]
    for k in range(8):
        for valley, sign in ((down, 1), (up, -1), (wrong, -1)):
            valley.backward(k)
            for p in valley.params:
                p.grad = sign * p.grad
        for opt in opts:
            opt.step()
    assert same(down.values, up.values) and not same(down.values, wrong.values)


@BOTH
def test_hooks_run_once_a_step_and_may_change_the_gradient(kind, fused):
    hooked, plain = Valley(), Valley()
    # With an optimizer of the base class about, torch wraps its `step` too: a `step` that calls it runs every hook twice.
    settings_ = {"lr": 1.0, "betas": (0.9, 0.98), "eps": 0.0, "weight_decay": 0.0}
    ParameterScaled([dead()], settings_, scaling="adam", estimator=Fixed(), per="model")
    left, right = make(kind, hooked.params, fused), make(kind, plain.params, fused)
    calls = []

    def halve(opt, args, kwargs):
        calls.append("pre")
        for p in hooked.params:
            p.grad = p.grad / 2

    handles = [left.register_step_pre_hook(halve), left.register_step_post_hook(lambda *_: calls.append("post"))]
    for k in range(4):
        for valley, opt in ((hooked, left), (plain, right)):
            loss = valley.backward(k)
            if valley is plain:
                for p in plain.params:
                    p.grad = p.grad / 2
            take(opt, loss)
    assert calls == ["pre", "post"] * 4 and same(hooked.values, plain.values)
    for handle in handles:
        handle.remove()
    take(left, hooked.backward(4))
    assert len(calls) == 8


@BOTH
def test_hooks_of_the_state_are_heard(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused)
    valley.train(opt, 3)
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "note": "kept"})
    saved = opt.state_dict()
    assert saved["note"] == "kept"
    again = make(kind, Valley().params, fused)

    def double(opt, state):
        return {**state, "state": {i: {**s, "exp_avg": 2 * s["exp_avg"]} for i, s in state["state"].items()}}

    again.register_load_state_dict_pre_hook(double)
    again.load_state_dict(saved)
    for a, b in zip(state_of(opt), state_of(again), strict=True):
        assert torch.equal(2 * a["exp_avg"], b["exp_avg"]) and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


@BOTH
def test_names_are_shown_and_saved_and_change_no_bit(kind, fused):
    named, plain = Valley(), Valley()
    pairs = list(zip("abc", named.params, strict=True))
    left = make(kind, [{"params": pairs[:1]}, {"params": pairs[1:2], "lr": 0.5}], fused)
    left.add_param_group({"params": pairs[2:], "weight_decay": 0.1})
    settings_ = [{}, {"lr": 0.5}, {"weight_decay": 0.1}]
    right = make(kind, [{"params": [p], **s} for p, s in zip(plain.params, settings_, strict=True)], fused)
    named.train(left, 5), plain.train(right, 5)
    assert same(named.values, plain.values)
    assert left.block_names == (["model"] if kind in ("model", "polyak") else ["a", "b", "c"])
    assert [g["param_names"] for g in left.state_dict()["param_groups"]] == [["a"], ["b"], ["c"]]


@BOTH
def test_the_learning_rate_shown_is_the_one_taken(kind, fused):
    """Without momentum, x moves by η g/α², with α² = √v̂ from the documented recursion."""
    valley = Valley(dtype=torch.float64)
    opt = make(kind, valley.params, fused, betas=(0.0, 0.98), lr=0.5)
    v = [torch.zeros_like(p) for p in valley.params]
    for k in range(6):
        before = valley.values
        loss = valley.backward(k)
        take(opt, loss)
        for i, (p, old) in enumerate(zip(valley.params, before, strict=True)):
            v[i] = 0.98 * v[i] + 0.02 * p.grad**2
            eta = opt.effective_lr[i if kind in ("tensor", "units") else 0]
            unit = old.new_tensor(1.0)
            if kind == "units":  # η is for y = x/σ, σ = rms(x₀); √v̂ of y is σ√v̂ of x
                unit = Valley(dtype=torch.float64).params[i].detach().square().mean().sqrt()
            step = eta * unit * p.grad / (v[i] / (1 - 0.98 ** (k + 1))).sqrt()
            assert torch.allclose(old - p, step, rtol=1e-9, atol=1e-15)
        assert (opt.effective_lr > 0).all() and not opt.effective_lr.requires_grad


# --- saved, copied, taken up again ------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(way, kind, fused):
    original, whole = Valley(), Valley()
    opt = make(kind, [{"params": original.params[:1], "weight_decay": 0.1}, {"params": original.params[1:], "lr": 0.5}], fused)
    other = make(kind, [{"params": whole.params[:1], "weight_decay": 0.1}, {"params": whole.params[1:], "lr": 0.5}], fused)
    original.train(opt, 4)
    twin, again = copy.deepcopy((original, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((original, opt)))
    assert again.param_groups[0]["params"][0] is twin.params[0]
    before, state = original.values, state_of(opt)
    twin.train(again, 4, 4)
    assert same(original.values, before) and same(state_of(opt), state)  # the copy has not touched the original
    original.train(opt, 4, 4), whole.train(other, 8)
    assert same(original.values, whole.values) and same(twin.values, whole.values)
    assert same(state_of(again), state_of(other)) and repr(again) == repr(other)


@BOTH
def test_a_state_loaded_twice_belongs_to_neither_nor_to_the_file(kind, fused):
    valley = Valley()
    opt = make(kind, valley.params, fused)
    valley.train(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    untouched = copy.deepcopy(saved)
    twins = [copy.deepcopy(valley) for _ in range(2)]
    opts = [make(kind, t.params, fused) for t in twins]
    for o in opts:
        o.load_state_dict(saved)
    twins[0].train(opts[0], 3, 3)
    assert same(saved, untouched)
    twins[1].train(opts[1], 3, 3)
    assert same(twins[0].values, twins[1].values)


@DTYPES
@BOTH
def test_a_loaded_state_keeps_its_precision_and_goes_where_its_parameter_is(kind, fused, dtype):
    valley = Valley(dtype=dtype)
    opt = make(kind, valley.params, fused)
    valley.train(opt, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = make(kind, [nn.Parameter(p.detach().clone()) for p in valley.params], fused)
    again.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for x, y in zip(state_of(again), state_of(opt), strict=True):
        assert shared(x) == shared(y) and all(same(x[n], y[n]) for n in shared(x)) and x["exp_avg"].dtype == dtype


STOP, END = range(7), 8


def resumable(kind, fused):
    valley = Valley()
    groups = [{"params": valley.params[:1], "weight_decay": 0.1}, {"params": valley.params[1:], "lr": 0.5}]
    opt = make(kind, groups, fused)
    return valley, opt, lr_scheduler.CosineAnnealingLR(opt, END)


def go_on(valley, opt, schedule, start, end):
    for k in range(start, end):
        valley.train(opt, 1, k)
        schedule.step()
    return {"params": valley.values, "opt": opt.state_dict(), "schedule": schedule.state_dict()}


def resume_all(file_in, file_out):
    """In a new process: every saved run to its end, on both paths."""
    saved, ends = torch.load(file_in, weights_only=True), {}
    for (kind, was_fused, stop), state in saved.items():
        for fused in (False, True):
            valley, opt, schedule = resumable(kind, fused)
            for p, x in zip(valley.params, state["params"], strict=True):
                p.data.copy_(x)
            opt.load_state_dict(state["opt"])
            schedule.load_state_dict(state["schedule"])
            ends[kind, was_fused, stop, fused] = go_on(valley, opt, schedule, stop, END)
    torch.save(ends, file_out)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    saved = {
        (kind, fused, stop): go_on(*resumable(kind, fused), 0, stop) for kind in KINDS for fused in (False, True) for stop in STOP
    }
    torch.save(saved, folder / "saved.pt")
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]!r}; import test_correct_under as t; t.resume_all(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(folder / "saved.pt"), str(folder / "ends.pt")], check=True)
    return torch.load(folder / "ends.pt", weights_only=True)


@BOTH
def test_a_run_stopped_at_any_step_ends_in_a_new_process_where_it_would_have_ended(kind, fused, resumed):
    whole = go_on(*resumable(kind, fused), 0, END)
    for stop in STOP:
        end = resumed[kind, fused, stop, fused]
        assert same(end["params"], whole["params"]) and same(end["opt"], whole["opt"]), stop


@BOTH
def test_a_run_begun_on_one_path_ends_on_the_other(kind, fused, resumed):
    whole = go_on(*resumable(kind, fused), 0, END)
    for stop in STOP:
        end = resumed[kind, fused, stop, not fused]
        assert [shared(s) for s in end["opt"]["state"].values()] == [shared(s) for s in whole["opt"]["state"].values()]
        for x, y in zip(end["params"], whole["params"], strict=True):
            # At most 8 steps, each within 16 roundings of eps/2 on either side, and what δ makes of them.
            assert torch.allclose(x, y, rtol=0, atol=640 * torch.finfo(x.dtype).eps * y.abs().max().item())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "model", "units"])
def test_a_sliced_run_goes_on_from_its_state_on_either_path(kind, fused):
    ends = []
    for resumed_on in (None, fused, not fused):
        valley = Valley([(90, 110), (17,)])
        opt = make(kind, valley.params, fused, slice_p=2)
        valley.train(opt, 3)
        if resumed_on is not None:
            saved = copy.deepcopy(opt.state_dict())
            opt = make(kind, valley.params, resumed_on, slice_p=2)
            opt.load_state_dict(saved)
        valley.train(opt, 3, 3)
        assert opt.state[valley.params[0]]["initial"].numel() < 5000 and opt.state[valley.params[1]]["initial"].numel() == 17
        ends.append(valley.values)
    assert same(ends[0], ends[1])
    for x, y in zip(ends[0], ends[2], strict=True):
        assert torch.allclose(x, y, rtol=0, atol=640 * torch.finfo(x.dtype).eps * x.abs().max().item())  # as above


# tests/data/state_0_1_0.pt.gz was written by pslib 0.1.0 (commit bd716de): a perceptron of 3, 4 and 1 units after 3 steps, and the
# gradients (nan: none), losses, parameters and learning rates of 3 more.  One bias starts at zero and gets its first gradient then.
def old_states():
    with gzip.open(TESTS / "data" / "state_0_1_0.pt.gz") as file:
        return torch.load(file, weights_only=True)


OLD = ["tensor", "model", "units", "neuron", "bfloat16", "polyak", "fixed"]


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("name", OLD)
def test_a_state_from_version_0_1_0_goes_on_as_that_version_did(name, fused):
    states = old_states()
    assert states["version"] == "0.1.0" and sorted(states["cases"]) == sorted(OLD)
    old, sizes = states["cases"][name], [math.prod(s) for s in states["shapes"]]

    def cut(flat):
        return [x.reshape(s).clone() for x, s in zip(flat.split(sizes), states["shapes"], strict=True)]

    params = [nn.Parameter(x) for x in cut(old["at"])]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    named = list(zip(names, params, strict=True))
    cls = {"PSDASGD": PSDASGD, "PSSPS": PSSPS, "ScaledSGD": ScaledSGD}[old["kind"]]
    path = {} if cls is ScaledSGD else {"fused": fused}
    opt = cls([{"params": named[:2]}, {"params": named[2:3]}, {"params": named[3:]}], **{"lr": 1.0, **old["settings"], **path})
    opt.load_state_dict(old["state"])
    # The same operations, perhaps in another order: at most 16 roundings of eps/2 a step on each side, and as much again through δ.
    # Version 0.1.0 rounded squares and differences of bfloat16 parameters to bfloat16 before it summed them; now they are not.
    bound = torch.finfo(torch.bfloat16).eps if name == "bfloat16" else 3 * 32 * torch.finfo(torch.float32).eps
    for grads, loss, after, rates in zip(old["gradients"], old["losses"], old["after"], old["rates"], strict=True):
        for p, g in zip(params, cut(grads), strict=True):
            p.grad = None if g.isnan().any() else g
        take(opt, loss)
        for p, x, start in zip(params, cut(after), cut(old["at"]), strict=True):
            assert bool(((p - x).abs() <= bound * (start.abs() + (x - start).abs())).all())
        assert torch.allclose(opt.effective_lr, torch.tensor(rates, dtype=torch.float64), rtol=bound, atol=0, equal_nan=True)
    assert ((old["after"][-1] - old["at"]).abs() > 2 * bound * old["at"].abs().max()).any()


# --- on a GPU ---------------------------------------------------------------------------------------------

@NEEDS_GPU
@ALL_KINDS
def test_on_a_gpu_no_step_waits(kind):
    valley = Valley(device="cuda")
    opt = make(kind, valley.params, True)
    valley.train(opt, 2)
    loss = valley.backward(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in (0.5, math.nan):
            valley.params[0].grad.fill_(value)
            take(opt, loss)
        shown = opt.effective_lr, opt.distance
        with pytest.raises(RuntimeError, match="synchroniz"):
            shown[0].cpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped_steps == 1


@NEEDS_GPU
@ALL_KINDS
def test_a_step_captured_in_a_cuda_graph_is_a_step(kind):
    ends = []
    for captured in (False, True):
        valley = Valley(device="cuda")
        opt, g = make(kind, valley.params, True), torch.Generator().manual_seed(0)
        for p in valley.params:
            p.grad = torch.zeros_like(p)
        loss, graph = torch.ones((), device="cuda"), None
        for k in range(9):
            for p in valley.params:
                p.grad.copy_(torch.randn(p.shape, generator=g) + 0.5 if k != 6 else torch.full(p.shape, math.inf))
            loss.fill_(1 / (1 + k))
            if captured and k == 3:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    take(opt, loss)
            if graph is None:
                take(opt, loss)
            else:
                graph.replay()
        ends.append((valley.values, state_of(opt), int(opt.skipped_steps)))
    assert same(*ends) and ends[0][2] == 1


@NEEDS_GPU
@BOTH
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_state_goes_on_on_another_device(here, there, kind, fused):
    valley, whole = Valley(dtype=torch.float64, device=here), Valley(dtype=torch.float64, device=there)
    opt, other = make(kind, valley.params, fused), make(kind, whole.params, fused)
    valley.train(opt, 4), whole.train(other, 8)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    moved = Valley(dtype=torch.float64, device=there)
    for p, q in zip(moved.params, valley.params, strict=True):
        p.data.copy_(q)
    again = make(kind, moved.params, fused)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert {v.device.type for s in again.state.values() for n, v in s.items() if isinstance(v, torch.Tensor) and n != "step"} == {there}
    moved.train(again, 4, 4)
    for x, y in zip(moved.values, whole.values, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-11)  # 8 steps in double precision, sums in another order


@NEEDS_GPU
@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("kind", ["tensor", "units"])
def test_parameters_on_several_devices_go_in_one_optimizer(kind, fused):
    valleys = [Valley([(9,)], device=d, seed=i) for i, d in enumerate(("cpu", "cuda"))]
    opt = make(kind, [p for v in valleys for p in v.params], fused)
    for k in range(6):
        for valley in valleys:
            valley.backward(k)
        opt.step()
    for i, valley in enumerate(valleys):
        alone = Valley([(9,)], device=("cpu", "cuda")[i], seed=i)
        alone.train(make(kind, alone.params, fused), 6)
        for x, y in zip(alone.values, valley.values, strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=0)  # six steps of single precision
