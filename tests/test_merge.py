"""The linear algebra of merging: what must hold for every method, and agreement with plain dense numpy."""

import math

import numpy as np
import pytest
import torch
from adapters import random_factors, regauged, related

from deltaray.errors import UserError
from deltaray.merge.elementwise import Rule, elect_and_merge
from deltaray.merge.factors import Factors, Joint, decompose
from deltaray.merge.gam import align, procrustes, singular_parts
from deltaray.merge.linear import mean
from deltaray.merge.matrix import merge_matrix
from deltaray.merge.methods import METHODS, Options

LINEAR = ("mean", "task-arithmetic", "cat")
IDENTICAL = {"gam": 1, "mean": 1, "task-arithmetic": 3, "cat": 3}
"""What n = 3 identical adapters give, in adapters."""


def merged(updates, method, *rest, **options):
    return merge_matrix(updates, method, *rest, options=Options(**options)).update.dense()


def close(found, wanted, tolerance=1e-10):
    scale = max(float(wanted.norm()), 1e-300)
    assert float((found - wanted).norm()) <= tolerance * scale


# --- against dense numpy, written from the papers' formulas ---------------------------------------------------------
def numpy_gam(updates, reference, rank):
    """GAM from full SVDs of the dense updates, step by step."""
    parts = [np.linalg.svd(update.dense().numpy()) for update in updates]
    parts = [(u[:, :rank], np.diag(s[:rank]), vt[:rank].T) for u, s, vt in parts]
    lefts, middles, rights = [], [], []
    for u, s, v in parts:
        rotations = []
        for basis, target in ((u, parts[reference][0]), (v, parts[reference][2])):
            p, _, qt = np.linalg.svd(basis.T @ target)
            rotations.append(p @ qt)
        lefts.append(u @ rotations[0])
        middles.append(rotations[0].T @ s @ rotations[1])
        rights.append(v @ rotations[1])
    return torch.from_numpy(np.mean(lefts, 0) @ np.mean(middles, 0) @ np.mean(rights, 0).T)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("reference", [0, 2])
def test_gam_is_that_of_dense_numpy(noise, reference):
    updates = related(4, noise)
    close(merged(updates, "gam", reference), numpy_gam(updates, reference, 6), 1e-9)


def test_the_plain_mean_has_no_cross_terms():
    updates = [random_factors(rank=rank, seed=rank) for rank in (2, 5, 7)]
    dense = torch.stack([update.dense() for update in updates])
    close(merged(updates, "mean"), dense.mean(0))
    close(merged(updates, "mean", weights=(1.0, 2.0, 5.0)), (dense * torch.tensor([1, 2, 5])[:, None, None]).sum(0) / 8)
    for method in ("task-arithmetic", "cat"):
        close(merged(updates, method), dense.sum(0))
        wanted = 3 * (dense[0] - 2 * dense[1] + dense[2] / 2)
        close(merged(updates, method, weights=(1.0, -2.0, 0.5), scale=3.0), wanted)


def test_a_cut_is_the_nearest_update_of_that_rank():
    updates = [random_factors(seed=seed) for seed in range(3)]
    u, s, vt = np.linalg.svd(np.mean([update.dense().numpy() for update in updates], 0))
    for method in ("mean", "cat"):
        found = merge_matrix(updates, method, options=Options(rank=5, scale=None if method == "mean" else 1 / 3))
        assert found.update.rank == 5
        close(found.update.dense(), torch.from_numpy(u[:, :5] * s[:5] @ vt[:5]))
        assert found.diagnosis.kept == pytest.approx((s[:5] ** 2).sum() / (s**2).sum())


def numpy_ties(values, density):
    """Trim, elect, disjoint mean, number by number."""
    values = [value.copy() for value in values]
    for value in values:
        kept = max(1, round(density * value.size))
        value[np.abs(value) < np.sort(np.abs(value), axis=None)[-kept]] = 0
    result = np.zeros_like(values[0])
    for place in np.ndindex(result.shape):
        numbers = [value[place] for value in values]
        winners = [number for number in numbers if number * sum(numbers) > 0]
        result[place] = sum(winners) / len(winners) if winners else 0
    return result


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_on_the_weights_is_that_of_numpy(density):
    updates = [random_factors(seed=seed) for seed in range(3)]
    wanted = numpy_ties([update.dense().float().numpy() for update in updates], density)
    close(merged(updates, "ties", density=density, rank=40), torch.from_numpy(wanted).double(), 1e-6)
    u, s, vt = np.linalg.svd(wanted)
    found = merge_matrix(updates, "ties", options=Options(density=density))  # at rank 3 * 6
    close(found.update.dense(), torch.from_numpy(u[:, :18] * s[:18] @ vt[:18]).double(), 1e-5)
    assert found.diagnosis.kept == pytest.approx((s[:18] ** 2).sum() / (s**2).sum(), rel=1e-4)


def test_ties_elects_a_sign_by_magnitude_and_averages_those_that_have_it():
    values = torch.tensor([[3.0, 1.0, 0.0, 2.0], [-1.0, 2.0, 0.0, -2.0], [-1.0, 0.0, 0.0, 0.0]])
    assert elect_and_merge(values).tolist() == [3.0, 1.5, 0.0, 0.0]


def test_knots_is_that_of_numpy():
    updates = [random_factors(seed=seed) for seed in range(3)]
    u, s, vt = np.linalg.svd(np.hstack([update.dense().numpy() for update in updates]), full_matrices=False)
    blocks = np.split(np.diag(s[:18]) @ vt[:18], 3, axis=1)
    close(merged(updates, "knots", density=0.3), torch.from_numpy(u[:, :18] @ numpy_ties(blocks, 0.3)), 1e-9)
    close(merged(updates, "knots", inner="mean"), merged(updates, "mean"))


def test_core_space_is_that_of_numpy():
    updates = [random_factors(seed=seed) for seed in range(3)]
    left = np.linalg.svd(np.hstack([update.left.numpy() for update in updates]), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack([update.right.numpy() for update in updates]), full_matrices=False)[2].T
    cores = [left.T @ update.dense().numpy() @ right for update in updates]
    close(merged(updates, "core-space", density=0.3), torch.from_numpy(left @ numpy_ties(cores, 0.3) @ right.T), 1e-9)
    close(merged(updates, "core-space", inner="mean"), merged(updates, "mean"))


def polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def test_tsv_is_that_of_numpy():
    updates = [random_factors(seed=seed) for seed in range(3)]
    parts = [np.linalg.svd(update.dense().numpy()) for update in updates]
    left, right = (polar(np.hstack(each)) for each in ([p[0][:, :2] for p in parts], [p[2][:2].T for p in parts]))
    wanted = left @ np.diag(np.concatenate([p[1][:2] for p in parts])) @ right.T
    close(merged(updates, "tsv"), torch.from_numpy(wanted), 1e-9)


def test_iso_c_and_iso_cts_are_those_of_numpy():
    updates = [random_factors(seed=seed) for seed in range(3)]
    dense = [update.dense().numpy() for update in updates]
    u, s, vt = np.linalg.svd(sum(dense))
    close(merged(updates, "iso-c"), torch.from_numpy(s[:18].mean() * u[:, :18] @ vt[:18]), 1e-9)
    common = 15  # 18 directions: 0.8 of them and what three equal shares of the rest leave
    lefts, values, rights = [u[:, :common]], [s[:common]], [vt[:common].T]
    for each in dense:
        a, b, ct = np.linalg.svd(each - lefts[0] @ (lefts[0].T @ each))
        lefts, values, rights = [*lefts, a[:, :1]], [*values, b[:1]], [*rights, ct[:1].T]
    wanted = np.concatenate(values).mean() * polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T
    close(merged(updates, "iso-cts"), torch.from_numpy(wanted), 1e-9)


# --- what must hold ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [name for name in METHODS if name != "core-space"])
def test_the_lora_gauge_does_not_matter(method):
    updates = [random_factors(seed=seed) for seed in range(3)]
    other = [regauged(update, seed) for seed, update in enumerate(updates)]
    tolerance = 1e-4 if method in ("ties", "dare") else 1e-9  # float32 on the weights
    close(merged(other, method), merged(updates, method), tolerance)


def test_averaging_the_factors_apart_would_depend_on_the_gauge():
    """The negative control of the test above."""
    one, two = random_factors(seed=0), random_factors(seed=1)
    apart = [(one.left + other.left) @ (one.right + other.right) / 4 for other in (two, regauged(two))]
    assert float((apart[0] - apart[1]).norm()) > 0.1 * float(apart[0].norm())


@pytest.mark.parametrize("method", ["gam", *LINEAR, "tsv"])
def test_one_adapter_is_the_identity(method):
    update = random_factors()
    close(merged([update], method), update.dense())


@pytest.mark.parametrize("method", ["ties", "dare", "knots", "core-space"])
def test_one_adapter_kept_whole_is_the_identity(method):
    update = random_factors()
    close(merged([update], method, density=1.0), update.dense(), 1e-6)


@pytest.mark.parametrize("method", IDENTICAL)
def test_identical_adapters_give_the_adapter(method):
    update = random_factors()
    copies = [update, regauged(update), regauged(update, 8)]
    close(merged(copies, method), IDENTICAL[method] * update.dense(), 1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dare"])
def test_opposite_adapters_cancel(method):
    update = random_factors()
    if method in ("iso-c", "iso-cts", "tsv"):
        assert float(merged([update, update.times(-1)], method).norm()) < 1e-9 * update.norm()
        return
    opposite = regauged(update.times(-1)) if method != "core-space" else update.times(-1)
    assert float(merged([update, opposite], method).norm()) < 1e-5 * update.norm()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dare"])
def test_the_order_does_not_matter_given_the_reference(method):
    updates = [random_factors(rank=rank, seed=rank) for rank in (6, 3, 5, 8)]
    order = [2, 0, 3, 1]
    shuffled = merged([updates[place] for place in order], method, order.index(1))
    close(shuffled, merged(updates, method, 1), 1e-5 if method == "ties" else 1e-9)


def test_the_reference_matters_to_gam_only_as_far_as_subspaces_differ():
    moved = [merge_matrix(related(4, noise), "gam").diagnosis.sensitivity for noise in (0.0, 0.5, 1.0, 2.0)]
    assert moved[0] < 1e-9 < moved[1] < moved[2] < moved[3]
    updates = related(4, 1.0)
    own = merged(updates, "gam", 0)
    others = [float((merged(updates, "gam", place) - own).norm() / own.norm()) for place in (1, 2, 3)]
    assert merge_matrix(updates, "gam", 0).diagnosis.sensitivity == pytest.approx(max(others))


@pytest.mark.parametrize("ranks", [(6, 6, 6), (6, 2, 9), (3, 8, 8), (0, 4, 4)])
def test_alignment_changes_no_update_and_keeps_bases_orthonormal(ranks):
    updates = [random_factors(rank=rank, seed=seed) for seed, rank in enumerate(ranks)]
    joint = Joint.of(updates)
    aligned = align(singular_parts(joint), 0)
    for update, left, middle, right in zip(updates, aligned.lefts, aligned.middles, aligned.rights, strict=True):
        assert left.shape[1] == right.shape[1] == max(ranks)
        for basis in (left, right):
            close(basis.T @ basis, torch.eye(max(ranks)).double())
        core = Factors(left @ middle, right.T)
        assert float((joint.expand(core).dense() - update.dense()).norm()) <= 1e-10 * max(ranks) * 48


def test_no_rotation_is_nearer_than_procrustes():
    frame, basis = (torch.linalg.qr(random_factors(seed=seed).left)[0] for seed in (0, 1))
    best = float((procrustes(basis, frame)[0] - frame).norm())
    for seed in range(200):
        die = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(6, 6, generator=die).double())[0]
        assert float((basis @ turn - frame).norm()) >= best - 1e-12
        small = basis[:, :4]  # completed by any two more directions it is not nearer either
        whole = torch.linalg.qr(torch.cat([small, torch.randn(48, 2, generator=die).double()], 1))[0]
        assert float((whole @ turn - frame).norm()) >= float((procrustes(small, frame)[0] - frame).norm()) - 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_rank_is_at_most_what_the_method_says(method):
    updates = [random_factors(seed=seed) for seed in range(3)]
    assert merge_matrix(updates, method).update.rank <= (6 if method in ("gam", "tsv") else 18)
    assert merge_matrix(updates, method, options=Options(rank=3)).update.rank <= 3


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1 - 1e-9, 1 + 1e-9), (0.5, 0.97, 1), (2.0, 0.3, 0.7)])
def test_gam_shrinks_as_subspaces_part(noise, low, high):
    updates = related(4, noise)
    found = merge_matrix(updates, "gam").diagnosis
    joint = Joint.of(updates)
    assert found.ratio == pytest.approx(align(singular_parts(joint), 0).mean().norm() / mean(joint).norm())
    assert low <= found.ratio <= high


def test_restored_gam_has_the_means_norm_and_gams_direction():
    updates = related(3, 2.0)
    plain, restored = merged(updates, "gam"), merged(updates, "gam", restore_norm=True)
    assert float(restored.norm()) == pytest.approx(float(merged(updates, "mean").norm()))
    close(restored / restored.norm(), plain / plain.norm())


@pytest.mark.parametrize("method", ["gam", "mean"])
def test_what_cancels_up_to_rounding_is_zero_and_nothing_is_measured_by_it(method):
    update = random_factors()
    found = merge_matrix([update, regauged(update.times(-1))], method)
    told = found.diagnosis
    assert found.update.rank == told.norm == told.mean_norm == 0
    assert told.ratio is None and told.sensitivity is None and told.interference == 1


# --- degenerate inputs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reference", [0, 1])
def test_zero_and_missing_adapters_are_the_same_and_finite(method, reference):
    update, start = random_factors(seed=0), random_factors(seed=1)
    start = Factors(torch.zeros_like(start.left), start.right)  # LoRA as it is initialised
    with_zero = merged([update, start], method, reference)
    close(merged([update, None], method, reference), with_zero)
    assert merge_matrix([start, None, start], method).update.dense().norm() == 0


def test_a_zero_adapter_halves_the_mean_and_gam_unless_skipped():
    update = random_factors()
    for method in ("gam", "mean"):
        for reference in (0, 1):
            close(merged([update, None], method, reference), update.dense() / 2)
            close(merged([update, None], method, reference, skip_missing=True), update.dense())


def test_repeated_singular_values_leave_gam_determined():
    bases = [torch.linalg.qr(random_factors(rank=8, seed=seed).left)[0] for seed in range(4)]
    updates = [Factors(3 * bases[0][:, :4], bases[1][:40, :4].T), Factors(2 * bases[2][:, :4], bases[3][:40, :4].T)]
    wanted = merged(updates, "gam")
    for seed in range(3):
        close(merged([regauged(update, seed) for update in updates], "gam"), wanted, 1e-9)


def test_a_rank_deficient_adapter_counts_with_its_true_rank():
    small = random_factors(rank=3, seed=1)
    padded = Factors(torch.cat([small.left, small.left], 1), torch.cat([small.right, small.right]) / 2)
    others = [random_factors(seed=2), random_factors(seed=3)]
    for reference in (0, 1):
        close(merged([padded, *others], "gam", reference), merged([small, *others], "gam", reference), 1e-9)
    assert merge_matrix([padded, *others], "gam").diagnosis.ranks == [3, 6, 6]


def test_orthogonal_adapters_are_merged_in_one_way_and_it_is_said():
    one, two = random_factors(rank=3, seed=0), random_factors(rank=3, seed=1)
    one = Factors(torch.cat([one.left, 0 * one.left]), torch.cat([one.right, 0 * one.right], 1))
    two = Factors(torch.cat([0 * two.left, two.left]), torch.cat([0 * two.right, two.right], 1))
    found = merge_matrix([one, two], "gam")
    assert found.diagnosis.undetermined == 6 and found.update.rank == 3
    assert found.diagnosis.overlap_left == found.diagnosis.overlap_right == 0
    for seed in range(3):
        close(merged([regauged(one, seed), regauged(two, seed + 1)], "gam"), found.update.dense(), 1e-9)
    assert merge_matrix([random_factors(seed=0), random_factors(seed=1)], "gam").diagnosis.undetermined == 0


# --- diagnostics and DARE -----------------------------------------------------------------------------------------
def test_angles_are_those_between_the_spaces():
    one = Factors(torch.eye(4, 2).double(), torch.eye(2, 5).double())
    turn = math.radians(30)
    left = torch.tensor([[1.0, 0], [0, math.cos(turn)], [0, math.sin(turn)], [0, 0]]).double()
    found = merge_matrix([one, Factors(left, torch.eye(2, 5).double())], "gam").diagnosis
    assert found.angles_left == pytest.approx([0, 0, 30], abs=1e-5)
    assert found.overlap_left == pytest.approx((1 + math.cos(turn) ** 2) / 2)
    assert found.angles_right == pytest.approx([0, 0, 0], abs=1e-5) and found.overlap_right == pytest.approx(1)


def test_interference_is_nothing_among_friends_and_all_among_opposites():
    update = random_factors()
    shares = [merge_matrix([update, other], "mean").diagnosis.interference for other in (update, update.times(-0.5))]
    assert shares == pytest.approx([0, 1])
    unrelated = [merge_matrix([update, random_factors(seed=s)], "mean").diagnosis.interference for s in range(1, 9)]
    assert 0.3 < sum(unrelated) / 8 < 0.7


def test_dare_drops_at_random_by_seed_and_keeps_the_mean():
    value = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).double()
    found = Rule("dare", 0.25, seed=3).merge([value])
    assert 0.24 < float((found != 0).double().mean()) < 0.26
    assert torch.equal(found[found != 0], 4 * value[found != 0])
    updates = [random_factors(seed=seed) for seed in range(2)]
    first, again, other = (merged(updates, "dare", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    named = [merge_matrix(updates, "dare", name=name).update.dense() for name in ("q_proj", "k_proj")]
    assert not torch.equal(*named)
    draws = torch.stack([merged(updates, "dare", seed=seed, rank=40) for seed in range(400)]).mean(0)
    close(draws, merged(updates, "mean"), 0.1)


def test_large_weights_are_cut_by_randomised_svd_nearly_as_well():
    updates = [random_factors(900, 800, 8, seed) for seed in range(2)]
    found = merge_matrix(updates, "ties", options=Options(density=0.5, rank=16))
    values = [update.dense().float() for update in updates]
    floors = [value.abs().flatten().sort().values[-round(0.5 * value.numel())] for value in values]
    kept = [torch.where(value.abs() >= floor, value, 0) for value, floor in zip(values, floors, strict=True)]
    dense = elect_and_merge(torch.stack(kept))
    values = torch.linalg.svdvals(dense.double())
    best = float(values[:16].square().sum() / values.square().sum())
    assert best * 0.999 < found.diagnosis.kept <= best * 1.0001


def test_weights_that_cancel_where_they_meet_are_refused():
    updates = [random_factors(seed=0), random_factors(seed=1), None]
    with pytest.raises(UserError, match="add up to zero"):
        merged(updates, "mean", weights=(1.0, -1.0, 1.0), skip_missing=True)


def test_decompose_is_the_thin_svd():
    update = random_factors()
    part = decompose(update)
    close(part.factors().dense(), update.dense())
    assert np.allclose(part.values, np.linalg.svd(update.dense().numpy())[1][:6])
    assert update.norm() == pytest.approx(float(update.dense().norm()))
