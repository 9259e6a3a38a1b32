"""The host emulator itself: it computes what a GPU computes, and it notices mistakes."""

import numpy as np
import pytest

SEEDS = range(4)
THREADS = 64


@pytest.fixture(scope="module")
def probes(emulated):
    return emulated("probes")


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(THREADS).astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_exchange_through_shared_memory(probes, values, seed):
    np.testing.assert_array_equal(probes.reverse(values, probes.Mistake.none, seed), values[::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_removed_barrier_gives_a_wrong_result(probes, values, seed):
    assert not np.array_equal(probes.reverse(values, probes.Mistake.no_barrier, seed), values[::-1])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("early_return", r"divergence: 41 threads at __syncthreads at .*probes\.cpp:\d+, 23 threads exited"),
        ("two_places", r"divergence: 32 threads at __syncthreads at .*, 32 threads at __syncthreads at "),
        ("past_the_end", "write past the end of the shared memory: byte 25[67] of 256"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_mistake_with_barriers_or_shared_memory_is_an_error(probes, values, mistake, message, seed):
    with pytest.raises(RuntimeError, match=message):
        probes.reverse(values, getattr(probes.Mistake, mistake), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_exchange_in_a_warp(probes, values, seed):
    sums = probes.warp_sum(values, probes.Mistake.none, seed)
    np.testing.assert_allclose(sums, values.reshape(2, 32).sum(axis=1).repeat(32), rtol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("half_warp", "divergence: 32 threads at __shfl_xor_sync, 32 threads exited"),
        (
            "mixed_operations",
            "lanes of a warp meet in __(syncwarp|shfl_xor_sync) and in __(shfl_xor_sync|syncwarp)",
        ),
    ],
)
def test_a_divergent_warp_is_an_error(probes, values, mistake, message):
    with pytest.raises(RuntimeError, match=message):
        probes.warp_sum(values, getattr(probes.Mistake, mistake), 0)


def test_a_ballot_counts_the_lanes_of_a_warp(probes, values):
    values[:32] = np.abs(values[:32]) + 1
    values[32:] = -np.abs(values[32:]) - 1
    values[40] = 1
    expected = [32 + 100 + 1000] * 32 + [1 + 100] * 32
    np.testing.assert_array_equal(probes.ballot(values, probes.Mistake.none, 0), expected)


@pytest.mark.parametrize("threads", [32, 256, 1024])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reduction_over_a_block(probes, threads, seed):
    values = np.random.default_rng(threads).integers(-100, 100, threads).astype(np.float32)
    results = probes.block_sum_and_max(values, probes.Mistake.none, seed)
    np.testing.assert_array_equal(results, np.full(threads, values.sum() + values.max()))


def test_a_misaligned_access_is_an_error(probes):
    with pytest.raises(RuntimeError, match=r"misaligned access at .*elements\.cuh:\d+"):
        probes.copy_to_an_odd_address()


def test_shared_memory_begins_as_nan(probes, values):
    assert np.isnan(probes.uninitialised(values, probes.Mistake.none, 0)).all()


def test_blocks_run_in_an_order_that_follows_the_seed(probes):
    orders = [tuple(probes.block_order(16, seed)) for seed in SEEDS]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(set(orders)) == len(orders)
    assert tuple(probes.block_order(16, 0)) == orders[0]


def test_a_block_that_no_gpu_takes_is_an_error_code(probes):
    assert probes.launch_too_large() == 9


def test_an_error_of_another_call_is_not_that_of_a_launch(probes):
    assert probes.launch_after_an_error() == 0
