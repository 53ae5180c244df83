"""Norms against NumPy in float64, at the extremes, in every dtype, and their slopes."""

import functools
import math
import subprocess
import sys

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, model
from flax import nnx

import optaxclip
from optaxclip import unit_axes

ORDS = [1, 2, math.inf]


def reference(arrays, ord, axis=None):
    """The norm in float64 and of no more than one line a case."""
    if axis is None:
        flat = np.concatenate(
            [np.ravel(np.asarray(x).astype(np.complex128)) for x in arrays]
        )
        return np.linalg.norm(flat, ord)
    modulus = np.abs(np.asarray(arrays[0]).astype(np.complex128))
    powers = {1: np.sum, 2: lambda x, **k: np.sqrt(np.sum(x**2, **k)), math.inf: np.max}
    return powers[ord](modulus, axis=axis, keepdims=True)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_norms_equal_numpy(dtype, ord):
    tree = model(dtype)
    leaves = jax.tree.leaves(tree)
    np.testing.assert_allclose(
        optaxclip.global_norm(tree, ord=ord), reference(leaves, ord), rtol=1e-6
    )
    norms = jax.tree.leaves(optaxclip.leaf_norm(tree, ord=ord))
    units = jax.tree.leaves(optaxclip.unit_norm(tree, unit_axes.output_last, ord=ord))
    for leaf, norm, unit in zip(leaves, norms, units, strict=True):
        np.testing.assert_allclose(norm, reference([leaf], ord), rtol=1e-6)
        axes = tuple(range(max(leaf.ndim - 1, 1)))
        np.testing.assert_allclose(unit, reference([leaf], ord, axes), rtol=1e-6)
        assert norm.dtype == unit.dtype == jnp.float32


def test_leaf_rms_equals_numpy():
    leaf = array(5, 3)
    np.testing.assert_allclose(
        optaxclip.leaf_rms([leaf])[0], np.sqrt(np.mean(np.square(leaf))), rtol=1e-6
    )


@pytest.mark.parametrize("sizes", [(1e200, 1.0), (1e-200, 1e-200), (1e-152, 1.0)])
def test_float64_leaves_whose_squares_do_not_fit(sizes):
    with jax.enable_x64(True):
        leaves = [jnp.full(4, size) for size in sizes]
        norms = optaxclip.leaf_norm(leaves)
        np.testing.assert_allclose(norms, [2 * size for size in sizes], rtol=1e-12)
        whole = optaxclip.global_norm(leaves)
    np.testing.assert_allclose(whole, 2 * np.hypot(*sizes), rtol=1e-12)


def test_float64_leaves_are_measured_in_float64():
    with jax.enable_x64(True):
        leaf = array(9, dtype=jnp.float64)
        assert optaxclip.global_norm([leaf]) == pytest.approx(
            np.linalg.norm(np.asarray(leaf)), rel=1e-15
        )
        wide = optaxclip.leaf_norm([leaf, array(3)])
        assert [n.dtype for n in wide] == [jnp.float64, jnp.float32]
        assert optaxclip.global_norm([leaf * 1e300]) == pytest.approx(
            1e300 * np.linalg.norm(np.asarray(leaf)), rel=1e-14
        )


def test_many_bfloat16_leaves_are_summed_in_float32():
    leaves = [jnp.ones((), jnp.bfloat16)] * 600  # a bfloat16 sum stops at 256
    assert optaxclip.global_norm(leaves) == pytest.approx(math.sqrt(600), rel=1e-6)


@hypothesis.given(st.integers(-125, 126), st.sampled_from(["float32", "bfloat16"]))
def test_the_2_norm_is_right_over_the_whole_range(exponent, dtype):
    leaf = jnp.asarray(np.ldexp([1.0, 0.5, 1.0], exponent), dtype)
    expected = np.ldexp(1.5, exponent)
    np.testing.assert_allclose(optaxclip.global_norm([leaf]), expected, rtol=3e-7)


@hypothesis.given(st.integers(-62, 126), st.integers(-62, 126))
def test_each_leaf_is_measured_in_its_own_range(first, second):
    leaves = [
        jnp.asarray(np.ldexp([1.0, 0.5, 1.0], e), jnp.float32) for e in (first, second)
    ]
    expected = [np.ldexp(1.5, e) for e in (first, second)]
    np.testing.assert_allclose(optaxclip.leaf_norm(leaves), expected, rtol=3e-7)
    units = jnp.stack(leaves)
    actual = optaxclip.unit_norm(units, axis=1)
    np.testing.assert_allclose(actual[:, 0], expected, rtol=3e-7)


@pytest.mark.parametrize("exponent", [-120, -70, 0, 70, 110])
@pytest.mark.parametrize("norm", [optaxclip.global_norm, optaxclip.leaf_norm])
def test_a_leaf_of_zeros_stays_zero_beside_the_extremes(norm, exponent):
    leaf = jnp.zeros(9).at[:3].set(jnp.asarray(np.ldexp([1, 0.5, 1], exponent)))
    zero = jnp.zeros(3)
    result = jax.tree.leaves(norm([leaf, zero]))
    np.testing.assert_allclose(result[0], np.ldexp(1.5, exponent), rtol=3e-7)
    assert all(x == 0 for x in result[1:])


def test_shares_of_leaves_in_shard_map_are_measured_whole():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    tree = {"shared": array(16, 3), "copied": array(4)}
    specs = {"shared": jax.P("x"), "copied": jax.P()}

    def norms(t):
        return optaxclip.global_norm(t), optaxclip.leaf_norm(t), optaxclip.leaf_rms(t)

    whole = norms(tree)
    shares = jax.shard_map(norms, mesh=mesh, in_specs=(specs,), out_specs=jax.P())(tree)
    for x, y in zip(jax.tree.leaves(shares), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-70, -63, -40, 0, 40, 63, 64, 100])
def test_small_elements_beside_large_ones_are_not_lost(exponent):
    """A sum that partly underflowed is taken again: the error stays at rounding."""
    values = np.ldexp(np.concatenate([[1.0], np.full(4096, 2.0**-6)]), exponent)
    leaf = jnp.asarray(values, jnp.float32)
    np.testing.assert_allclose(
        optaxclip.global_norm([leaf]), np.linalg.norm(values), rtol=1e-6
    )


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("norm", [optaxclip.global_norm, optaxclip.leaf_norm])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_elements_show(norm, bad, ord):
    (result,) = jax.tree.leaves(norm(jnp.array([1.0, bad, 2.0]), ord=ord))
    np.testing.assert_equal(float(result), bad)


@pytest.mark.parametrize("ord", ORDS)
def test_nothing_has_norm_zero(ord):
    assert optaxclip.global_norm({}, ord=ord) == 0
    assert optaxclip.global_norm([jnp.zeros((0, 3))], ord=ord) == 0
    assert optaxclip.leaf_norm([jnp.zeros((0, 3))], ord=ord)[0] == 0
    assert optaxclip.leaf_rms([jnp.zeros((0, 3))])[0] == 0
    assert optaxclip.leaf_norm({}, ord=ord) == {}


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize(
    "norm",
    [
        optaxclip.global_norm,
        optaxclip.leaf_norm,
        functools.partial(optaxclip.unit_norm, axis=0),
        optaxclip.leaf_rms,
    ],
)
@pytest.mark.sample(1)
def test_slopes_equal_finite_differences(norm, dtype):
    tree = {"a": array(4, 3, dtype=dtype), "b": array(4, dtype=dtype)}
    direction = {
        "a": array(4, 3, dtype=dtype, seed=5),
        "b": array(4, dtype=dtype, seed=6),
    }

    def total(t):
        with jax.numpy_dtype_promotion("standard"):
            x = jax.tree.map(lambda x, d: x + t * d, tree, direction)
        return sum(jnp.sum(n) for n in jax.tree.leaves(norm(x)))

    slope = jax.jvp(total, (0.0,), (1.0,))[1]
    numeric = (total(1e-2) - total(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, numeric, rtol=1e-3)
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-5)


@pytest.mark.parametrize("norm", [optaxclip.global_norm, optaxclip.leaf_norm])
def test_vmap_measures_each_example_in_its_own_range(norm):
    batch = jnp.array([[3.0, 4.0], [3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    norms = jax.vmap(norm)(batch)
    np.testing.assert_allclose(norms, [5.0, 5e30, 5e-30, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("axis", "shape", "expected"),
    [
        (None, (), ()),
        (None, (7,), (1,)),
        (None, (1, 7), (1, 1)),
        (None, (5, 7), (1, 7)),
        (None, (2, 5, 7), (1, 5, 7)),
        (None, (2, 3, 5, 7), (1, 1, 1, 7)),
        (None, (2, 3, 4, 5, 7), (1, 1, 1, 1, 7)),
        (-1, (5, 7), (5, 1)),
        ((0, -1), (5, 6, 7), (1, 6, 1)),
        (unit_axes.output_last, (3, 5, 7), (1, 1, 7)),
        (unit_axes.output_last, (7,), (1,)),
        (unit_axes.output_first, (7, 5, 3), (7, 1, 1)),
        (unit_axes.output_first, (7, 5), (7, 1)),
        (unit_axes.output_first, (7,), (1,)),
        (unit_axes.stacked(unit_axes.output_last), (4, 5, 7), (4, 1, 7)),
        (unit_axes.stacked(unit_axes.output_last), (4, 7), (4, 1)),
        (unit_axes.stacked(unit_axes.by_rank), (4, 2, 3, 5, 7), (4, 1, 1, 1, 7)),
    ],
)
def test_unit_axes(axis, shape, expected):
    assert optaxclip.unit_norm(jnp.ones(shape), axis=axis).shape == expected


def test_unit_axes_of_flax_attention():
    tree = {
        "attention": {
            "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))},
            "out": {"kernel": jnp.ones((2, 4, 8))},
        },
        "conv": {"kernel": jnp.ones((3, 5, 7))},
    }
    shapes = jax.tree.map(jnp.shape, optaxclip.unit_norm(tree, axis=unit_axes.flax))
    assert shapes["attention"]["query"]["kernel"] == (1, 2, 4)
    assert shapes["attention"]["out"]["kernel"] == (1, 1, 8)
    assert shapes["conv"]["kernel"] == (1, 1, 7)


def test_unit_axes_of_flax_know_the_names_of_nnx_states():
    convolution = nnx.Conv(4, 6, kernel_size=(3,), rngs=nnx.Rngs(0))
    norms = optaxclip.unit_norm(nnx.state(convolution, nnx.Param), axis=unit_axes.flax)
    assert [x.shape for x in jax.tree.leaves(norms)] == [(1,), (1, 1, 6)]


def test_unit_axes_as_a_prefix_tree():
    tree = {
        "a": [jnp.ones((5, 7)), jnp.ones((2, 5, 7))],
        "b": jnp.ones((5, 7)),
        "c": None,
    }
    axis = {"a": 0, "b": (0, 1), "c": None}
    norms = optaxclip.unit_norm(tree, axis=axis)
    assert [n.shape for n in norms["a"]] == [(1, 7), (1, 5, 7)]
    assert norms["b"].shape == (1, 1)


@pytest.mark.parametrize("ord", [1, 2, np.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_of_either_sign_is_seen(sign, ord):
    """0 * infinity, as processors compute it, has its sign bit set."""
    nan = jnp.asarray(np.copysign(np.nan, sign), jnp.float32)
    tree = {"a": jnp.stack([jnp.float32(3), nan]), "b": jnp.ones(2)}
    assert np.isnan(optaxclip.global_norm(tree, ord=ord))
    tx = optaxclip.clip_by(lambda t: optaxclip.leaf_norm(t, ord=ord), 1.0)
    _, state = tx.update(tree, tx.init(tree))
    assert np.isnan(optaxclip.metrics(state)["grad_norm"])
    assert state.nonfinite_count == 1


def test_the_derivative_of_a_maximum_is_shared_by_its_places():
    tree = {"a": jnp.array([3.0, -3.0, 1.0]), "b": jnp.array([2.0])}
    slopes = jax.grad(lambda t: optaxclip.leaf_norm(t, ord=np.inf)["a"])(tree)
    np.testing.assert_array_equal(slopes["a"], [0.5, -0.5, 0.0])
    np.testing.assert_array_equal(slopes["b"], [0.0])


def test_leaves_that_are_all_tiny_are_measured():
    tree = {"a": jnp.full(4, 1e-25), "b": jnp.zeros(3)}
    norms = optaxclip.leaf_norm(tree)
    np.testing.assert_allclose(norms["a"], 2e-25, rtol=1e-6)
    assert norms["b"] == 0


COMPLEX = jnp.array([1, 2j], jnp.complex64)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1.0, 1e25, 3e38])
def test_the_direction_of_a_gradient_is_its_slope_at_every_size(size):
    leaf = jnp.asarray([0.6 * size, -0.8 * size], jnp.float32)
    for norm in (optaxclip.global_norm, lambda x: optaxclip.leaf_norm(x)[()]):
        slope = jax.grad(norm)(leaf)
        np.testing.assert_allclose(slope, [0.6, -0.8], rtol=1e-5)
        half = leaf / 2  # whose norm fits, too
        _, slope = jax.jvp(norm, (jax.lax.complex(half, half[::-1]),), (COMPLEX,))
        of = np.array([0.6, -0.8, -0.8, 0.6]) / np.sqrt(2)  # real parts, then imaginary
        np.testing.assert_allclose(slope, of @ [1, 0, 0, 2], rtol=1e-5)


def test_a_norm_is_the_same_beside_leaves_that_overflow_or_vanish():
    leaves = [array(50, seed=i) for i in range(3)]
    alone = optaxclip.leaf_norm(leaves)
    for other in (1e30, 1e-17, 1e-30, np.nan, 0.0):
        beside = optaxclip.leaf_norm([*leaves, jnp.full(3, other)])
        np.testing.assert_array_equal(beside[:3], alone)


def test_squares_that_vanish_on_many_devices_are_seen_in_their_sum():
    """One element just visible, and on each of 256 devices 100 just invisible ones."""
    info = np.finfo(np.float32)
    shares = np.full((256, 100), np.sqrt(info.tiny) * 0.9999, np.float32)
    shares[0, 0] = np.sqrt(100 * info.tiny / info.eps) * 1.00001
    norm = functools.partial(optaxclip.global_norm, axis_name="d")
    norms = jax.vmap(norm, axis_name="d")(shares)
    expected = np.linalg.norm(shares.astype(np.float64))
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "platforms"),
    [
        (optaxclip.global_norm, {"cpu"}),
        (optaxclip.leaf_norm, {"cpu"}),
        (optaxclip.unit_norm, {"cpu", "cuda", "rocm"}),
    ],
)
def test_where_sums_are_taken_in_float64(norm, platforms):
    """On a GPU only those of units: of several sums of columns XLA makes copies."""
    traced = jax.jit(norm).trace({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("f64" in text) == (platform in platforms), platform


def test_sizes_may_be_symbolic():
    (rows,) = jax.export.symbolic_shape("rows")
    tree = {"w": jax.ShapeDtypeStruct((rows, 4), jnp.float32)}
    for norm in (optaxclip.leaf_norm, lambda t: {"w": optaxclip.global_norm(t)}):
        exported = jax.export.export(jax.jit(norm))(tree)
        assert exported.call({"w": jnp.full((9, 4), 0.5)})["w"] == 3.0


def test_norms_of_shapes_start_no_backend():
    """After one, `jax.distributed.initialize` would refuse to start."""
    program = """
import jax, optaxclip
from jax._src import xla_bridge
leaf = jax.ShapeDtypeStruct((200, 200), "float32")
for norm in (optaxclip.global_norm, optaxclip.leaf_norm):
    jax.eval_shape(optaxclip.clip_by(norm, 1.0).init, [leaf])
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
