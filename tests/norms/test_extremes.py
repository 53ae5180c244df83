"""Gradients over the whole range of their dtypes: direction kept, norm right, no zeros.

The reference is NumPy in float64. Where float32 cannot hold the answer (a norm beyond
its largest number, a scale below its smallest), the step is counted as not finite.
Every test runs with the sums that a CPU takes, of few and of many squares, and with
those of GPU and TPU.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip._norms import euclidean

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)

CLIP = jax.jit(
    lambda grads, max_norm: _update(optaxclip.clip_by_global_norm(max_norm), grads)
)
LEAVES = jax.jit(
    lambda grads, max_norm: _update(optaxclip.clip_by_leaf_norm(max_norm), grads)
)


@pytest.fixture(autouse=True, scope="module", params=["cpu", "cpu, many", "default"])
def platform(request):
    """Takes the sums of this platform, whatever the platform is."""
    name, _, many = request.param.partition(", ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda x, **takes: takes[name](x))
        if many:
            patch.setattr(euclidean, "MANY", 0)
            patch.setattr(jax, "device_count", lambda: 1)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def _update(tx, grads):
    return tx.update(grads, tx.init(grads))


def tree_of(mantissas, magnitude, dtype):
    """Two leaves whose largest element is about ``magnitude``."""
    values = np.asarray(mantissas, np.float64) * magnitude
    limit = float(jnp.finfo(dtype).max)
    values = np.clip(values, -limit, limit)
    return {"a": jnp.asarray(values[:5], dtype), "b": jnp.asarray(values[5:], dtype)}


def flat(tree):
    leaves = [np.ravel(np.asarray(x).astype(np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def assert_clipped(updates, grads, scale, dtype):
    """``scale * grads``, to one rounding and that of the scale; or what vanishes."""
    info = jnp.finfo(dtype)
    np.testing.assert_allclose(
        flat(updates),
        scale * flat(grads),
        rtol=float(info.eps) + 5e-7,
        atol=float(info.tiny),
    )


mantissas = st.lists(
    st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), min_size=8, max_size=8
)


def exponents(dtype):
    """Of two: those of all normal numbers."""
    info = jnp.finfo(dtype)
    return st.integers(int(info.minexp) + 10, int(info.maxexp))


@every_dtype
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
@pytest.mark.sample(2)
def test_norm_and_clip_over_the_whole_range(dtype, data):
    exponent = data.draw(exponents(dtype), label="exponent")
    tree = tree_of(data.draw(mantissas), 2.0**exponent, dtype)
    norm = np.sqrt(np.sum(np.square(flat(tree))))
    hypothesis.assume(norm < float(jnp.finfo(jnp.float32).max))
    np.testing.assert_allclose(optaxclip.global_norm(tree), norm, rtol=2e-6)
    ratio = 2.0 ** data.draw(st.integers(-8, -1), label="threshold ratio")
    hypothesis.assume(norm * ratio > 2.0**-120)
    updates, state = CLIP(tree, jnp.float32(norm * ratio))
    assert (state.clip_count, state.nonfinite_count) == (1, 0)
    assert_clipped(updates, tree, ratio, dtype)
    after = np.sqrt(np.sum(np.square(flat(updates))))
    if np.abs(flat(updates)).min() > float(jnp.finfo(dtype).tiny):
        assert after <= norm * ratio * (1 + float(jnp.finfo(dtype).eps) + 5e-7)


@every_dtype
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_far_above_a_threshold_of_one(dtype, data):
    """What a spike looks like: any magnitude against an ordinary threshold."""
    largest = min(int(jnp.finfo(dtype).maxexp), 122)
    exponent = data.draw(st.integers(4, largest), label="exponent")
    tree = tree_of(data.draw(mantissas), 2.0**exponent, dtype)
    norm = np.sqrt(np.sum(np.square(flat(tree))))
    hypothesis.assume(norm > 2)
    updates, state = CLIP(tree, jnp.float32(1))
    assert (state.clip_count, state.nonfinite_count) == (1, 0)
    assert_clipped(updates, tree, 1 / norm, dtype)
    assert 0.99 < np.sqrt(np.sum(np.square(flat(updates)))) < 1.01


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_leaves_of_very_different_magnitude(data):
    """At leaf scope each leaf has its own unit: 1e38 beside 1e-19."""
    sizes = [10.0 ** data.draw(st.integers(-18, 37)) for _ in range(3)]
    tree = {str(i): jnp.full((4,), size, jnp.float32) for i, size in enumerate(sizes)}
    updates, state = LEAVES(tree, jnp.float32(1))
    norms = state.clip_metrics.grad_norm.norm_values
    for i, size in enumerate(sizes):
        norm = 2 * float(np.float32(size))
        np.testing.assert_allclose(norms[i], norm, rtol=1e-6)
        expected = float(np.float32(size)) * min(1, 1 / norm)
        np.testing.assert_allclose(updates[str(i)], expected, rtol=1e-6)
    assert state.nonfinite_count == 0


SUMS = {"cpu": 1, "cpu, many": 2, "default": 3}


def test_only_many_squares_on_a_cpu_have_a_branch(platform):
    lowered = jax.jit(optaxclip.global_norm).lower(jnp.ones(3)).as_text()
    assert ("stablehlo.case" in lowered) == (platform == "cpu, many")
    assert lowered.count("applies stablehlo.add") == SUMS[platform]


def test_sums_for_gpu_and_tpu_are_added_in_turn(platform):
    """In pairs, for which a TPU moves bytes, small ones add up before they are lost."""
    leaves = [jnp.ones(1), *[jnp.full(1, 2.0**-12)] * 15]
    assert (optaxclip.global_norm(leaves) == 1) == (platform == "default")


def test_no_leaf_waits_for_another_one(platform):
    lowered = jax.jit(optaxclip.leaf_norm).lower([jnp.ones(3), jnp.ones(4)]).as_text()
    branches = 2 if platform == "cpu, many" else 0
    assert lowered.count('"stablehlo.case"') == branches


def test_many_squares_that_vanish_beside_one_that_does_not():
    leaf = jnp.concatenate([jnp.full(4096, 1e-20), jnp.full(1, 1e-18)])
    norm = np.sqrt(4096 * 1e-40 + 1e-36)
    np.testing.assert_allclose(optaxclip.global_norm(leaf), norm, rtol=1e-6)


def test_a_tiny_leaf_or_group_beside_a_larger_one_has_its_own_norm():
    tree = [jnp.full(4, 1e-25), jnp.ones(4)]
    of_groups = optaxclip.subtree_norm(tree).values()
    for norms in (optaxclip.leaf_norm(tree), list(of_groups)):
        np.testing.assert_allclose(norms, [2e-25, 2.0], rtol=1e-6)


def test_a_unit_that_overflows_beside_one_that_does_not():
    norms = optaxclip.unit_norm(jnp.array([[1e25, 1.0], [1e25, 1.0]]))
    np.testing.assert_allclose(norms, [[2**0.5 * 1e25, 2**0.5]], rtol=1e-6)


def test_tiny_units_beside_one_that_is_nan():
    norms = optaxclip.unit_norm(jnp.array([[1e-25, 1.0], [1e-25, jnp.nan]]))
    np.testing.assert_allclose(norms, [[2**0.5 * 1e-25, jnp.nan]], rtol=1e-6)


def test_tiny_units_beside_larger_ones(platform):
    """Where there is a branch, a unit that vanished may be dead: it needs no other."""
    norms = optaxclip.unit_norm(jnp.array([[1e-25, 1.0], [1e-25, 1.0]]))
    own = 0.0 if platform == "cpu, many" else 2**0.5 * 1e-25
    np.testing.assert_allclose(norms, [[own, 2**0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (float(jnp.finfo(jnp.float32).max), 1),  # the largest number there is
        (1.8e19, 1),  # the largest whose square is finite
        (1.9e19, 4096),  # the first whose square is not
        (1e-19, 4096),
        (1.1e-19, 1),
        (float(jnp.finfo(jnp.float32).tiny), 1),  # the smallest normal number
        (float(jnp.finfo(jnp.float32).tiny), 4096),
    ],
)
@pytest.mark.parametrize("large", [False, True], ids=["in a row", "in a loop"])
def test_float32_at_its_edges(value, size, large):
    padding = jnp.zeros(2**20 + 1 if large else 1, jnp.float32)  # makes it the loop
    tree = {"w": jnp.full((size,), value, jnp.float32), "padding": padding}
    norm = float(np.float32(value)) * np.sqrt(size)
    np.testing.assert_allclose(optaxclip.global_norm(tree), norm, rtol=1e-6)
    updates, state = CLIP(tree, jnp.float32(norm / 4))
    np.testing.assert_allclose(updates["w"], max(value / 4, 0), rtol=1e-5, atol=1.2e-38)
    assert state.nonfinite_count == 0


EDGES = {
    "largest bfloat16": (jnp.bfloat16, 3.3895314e38, 1),
    "smallest bfloat16": (jnp.bfloat16, 1.1754944e-38, 2000),
    "largest float16": (jnp.float16, 65504.0, 2000),
    "smallest normal float16": (jnp.float16, 6.1035156e-05, 2000),
    "smallest float16": (jnp.float16, 5.9604645e-08, 2000),
}


@pytest.mark.parametrize(("dtype", "value", "size"), EDGES.values(), ids=EDGES)
def test_half_precision_at_its_edges(dtype, value, size):
    tree = [jnp.full((size,), value, dtype)]
    norm = value * np.sqrt(size)
    np.testing.assert_allclose(optaxclip.global_norm(tree), norm, rtol=1e-6)
    updates, state = CLIP(tree, jnp.float32(norm / 4))
    vanishes = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(
        flat(updates), value / 4, rtol=0.004, atol=max(vanishes, 1.2e-38)
    )
    assert (state.clip_count, state.nonfinite_count) == (1, 0)


BEYOND = {
    "norm above the largest float32": (3e38, 100, 1.0),
    "scale below the smallest float32": (3e38, 1, 1.0),
}


@pytest.mark.parametrize(("value", "size", "max_norm"), BEYOND.values(), ids=BEYOND)
def test_beyond_float32_is_counted_and_can_be_skipped(value, size, max_norm):
    grads = jnp.full((size,), value, jnp.float32)
    updates, state = CLIP(grads, jnp.float32(max_norm))
    assert (state.clip_count, state.nonfinite_count) == (0, 1)
    assert np.all(np.asarray(updates) == 0)
    tx = optaxclip.skip_by(
        optax.chain(optaxclip.clip_by_global_norm(max_norm), optax.sgd(1.0)),
        threshold=1e37 * max_norm,
    )
    _, state = tx.update(grads, tx.init(grads), grads)
    assert state.skip_count == 1
