"""Every transform, rule and kind of tree that the contracts are tested on."""

import functools
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip import contrib, rules, unit_axes

LOW = 0.05  # a threshold that every tree below exceeds at first
HIGH = 1e6  # one that none reaches
# `clip_by_percentile` as a guard alone: a percentile of the norms before.
GUARD: Any = {"factor": 1.0, "ramp": 0, "include_current": False}

# name -> threshold and `axis_name=`, if any -> transformation. A new transform gets a
# row here, and with it every contract test. Adaptive ones take the threshold as a cap.
TRANSFORMS = {
    "clip_by_value": optaxclip.clip_by_value,
    "clip_by_global_norm": optaxclip.clip_by_global_norm,
    "clip_by_leaf_norm": optaxclip.clip_by_leaf_norm,
    "clip_by_subtree_norm": optaxclip.clip_by_subtree_norm,
    "clip_by_block_rms": optaxclip.clip_by_block_rms,
    "adaptive_grad_clip": lambda t, **axis: optaxclip.adaptive_grad_clip(
        t, axis=last_axes, **axis
    ),
    "clip_by(global_norm, ord=1)": lambda t, **axis: optaxclip.clip_by(
        functools.partial(optaxclip.global_norm, ord=1), t, **axis
    ),
    "clip_by(leaf_norm, ord=inf)": lambda t, **axis: optaxclip.clip_by(
        functools.partial(optaxclip.leaf_norm, ord=np.inf), t, **axis
    ),
    "clip_by(unit_norm, lowest)": lambda t, **axis: optaxclip.clip_by(
        unit_norm,
        optaxclip.lowest(optaxclip.relative(1.0, floor=t), t, lambda step: 2 * t),
        **axis,
    ),
    "clip_by_percentile": lambda t, **axis: optaxclip.clip_by_percentile(
        95, 20, max_norm=t, **GUARD, **axis
    ),
    "clip_by_percentile(leaf)": lambda t, **axis: optaxclip.clip_by_percentile(
        95, 5, max_norm=t, norm=optaxclip.leaf_norm, **GUARD, **axis
    ),
    "autoclip": lambda t, **axis: optaxclip.autoclip(10, 20, max_norm=t, **axis),
    "zclip": lambda t, **axis: optaxclip.zclip(warmup=2, max_norm=t, **axis),
    "adagc": lambda t, **axis: optaxclip.clip_by(
        optaxclip.leaf_norm, optaxclip.lowest(optaxclip.ema(warmup=2), t), **axis
    ),
    "clip_by(unit_norm, tracked_quantile)": lambda t, **axis: optaxclip.clip_by(
        unit_norm, optaxclip.lowest(optaxclip.tracked_quantile(0.9, 0.05), t), **axis
    ),
    "clip_by(window_zscore * 2)": lambda t, **axis: optaxclip.clip_by(
        optaxclip.global_norm,
        optaxclip.lowest(
            optax.chain(
                optaxclip.window_zscore(window=4, min_count=2), optax.scale(2.0)
            ),
            t,
        ),
        **axis,
    ),
}

# As above, for `tests/contrib`: few of these leave what is below a threshold as it is.
CONTRIB = {
    "smooth_clip": contrib.smooth_clip,
    "limit_growth": lambda t, **axis: contrib.limit_growth(1.0 + t, t, **axis),
    "clippy": lambda t, **axis: contrib.clippy(t, t, **axis),
    "clip_by(global_norm, sketched_quantile)": lambda t, **axis: optaxclip.clip_by(
        optaxclip.global_norm,
        optaxclip.lowest(contrib.sketched_quantile(0.5, accuracy=0.2), t),
        **axis,
    ),
    "adagn": lambda t, **axis: contrib.adagn(eps=t, **axis),
    "clip_coordinate_spikes": lambda t, **axis: contrib.clip_coordinate_spikes(
        t, warmup=1, **axis
    ),
    "with_error_feedback": lambda t, **axis: contrib.with_error_feedback(
        optaxclip.clip_by_leaf_norm(t, **axis), **axis
    ),
    "normalize": lambda t, **axis: optaxclip.clip_by(
        unit_norm, t, optaxclip.normalize, **axis
    ),
}

# One of each kind of norm and of state, for what cannot tell others apart: loops of
# training libraries, wrappers, trees with holes.
ONE_OF_EACH = {
    name: TRANSFORMS[name]
    for name in (
        "clip_by_value",
        "clip_by_global_norm",
        "adaptive_grad_clip",
        "clip_by_percentile(leaf)",
        "zclip",
    )
}

# name -> (a function of numbers that may be traced, such numbers). A new rule gets a
# row here, and with it every contract test of rules. Warm-ups are of 10 norms at most.
RULES = {
    "quantile": (lambda q: optaxclip.quantile(q, 20), (0.9,)),
    "quantile(ramp)": (lambda q: optaxclip.quantile(q, 20, ramp=10), (0.9,)),
    "quantile(include_current)": (
        lambda q: optaxclip.quantile(q, 20, include_current=True),
        (0.7,),
    ),
    "tracked_quantile": (optaxclip.tracked_quantile, (0.9, 0.05)),
    "tracked_quantile(start)": (
        lambda q, rate, start: optaxclip.tracked_quantile(q, rate, start=start),
        (0.5, 0.2, 0.02),
    ),
    "sketched_quantile": (
        lambda q, decay: contrib.sketched_quantile(q, decay, accuracy=0.05),
        (0.9, 0.98),
    ),
    "zscore": (lambda z, decay: optaxclip.zscore(z, decay, warmup=10), (2.5, 0.97)),
    "zscore(published)": (
        lambda z, decay: optaxclip.zscore(
            z,
            decay,
            warmup=10,
            start=rules.moments,
            response=as_published,
            record=as_published,
            min_deviation=0.0,
        ),
        (2.5, 0.97),
    ),
    "window_zscore": (lambda z: optaxclip.window_zscore(z, 20, 10), (3.0,)),
    "ema": (lambda ratio, decay: optaxclip.ema(ratio, decay, 10), (1.05, 0.98)),
    "ema(average)": (
        lambda ratio, decay: optaxclip.ema(ratio, decay, 10, start=rules.average),
        (2.0, 0.9),
    ),
    "lowest(quantile * 2, ...)": (
        lambda cap, q: optaxclip.lowest(
            cap, optax.chain(optaxclip.quantile(q, 20), optax.scale(2.0))
        ),
        (0.03, 0.5),
    ),
}


def as_published(norm: Any, mean: Any, bound: Any) -> Any:
    """ZClip's answer to a spike, with its epsilon of 1e-6 in z."""
    return rules.reciprocal(norm, mean, bound, eps=2.5e-6)


def unit_norm(tree: Any, **axis: Any) -> Any:
    return optaxclip.unit_norm(tree, axis=last_axes, **axis)


def last_axes(path: Any, leaf: Any) -> tuple[int, ...]:
    """Units of leaves of any rank."""
    return unit_axes.output_last(path, leaf)


class Group(NamedTuple):
    """A NamedTuple, as many trees hold one."""

    kernel: Any
    bias: Any


def array(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    values = np.random.default_rng((seed, *shape)).normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * np.random.default_rng((seed + 1, *shape)).normal(
            size=shape
        )
    return jnp.asarray(values, dtype)


def model(dtype: Any) -> Any:
    return {
        "dense": {"kernel": array(5, 3, dtype=dtype), "bias": array(3, dtype=dtype)},
        "conv": array(2, 2, 3, 4, dtype=dtype),
    }


def of_all_kinds() -> Any:
    """Gradients of every rank in every container, and leaves that are none."""
    return {
        "nested": [Group(array(4, 2), (array(2), {"c": array()}))],
        "frozen": flax.core.freeze({"kernel": array(3, 2), "bias": array(2)}),
        "scalars": (array(), array(dtype=jnp.bfloat16, seed=1)),
        "zero-size": array(0, 3),
        "nothing": (),
        "None": None,
        "MaskedNode": optax.MaskedNode(),
        "integer": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "key": jax.random.key(0),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "_overwrite_with_gradient": {"scale": array(1)},
    }


# name -> (does it need x64, a function that makes it). Each costs a compiled program
# for every clip, so what cannot fail apart stands in one tree.
TREES = {
    "float32": (False, lambda: model(jnp.float32)),
    "bfloat16": (False, lambda: model(jnp.bfloat16)),
    "float16": (False, lambda: model(jnp.float16)),
    "complex64": (False, lambda: model(jnp.complex64)),
    "float8": (False, lambda: model(jnp.float8_e4m3fn)),
    "mixed": (
        False,
        lambda: (
            [array(3, 2, dtype=d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)]
            + [array(4, dtype=jnp.complex64), array(2, dtype=jnp.float8_e4m3fn)]
        ),
    ),
    "mixed with float64": (
        True,
        lambda: [
            array(3, 2),
            array(4, dtype=jnp.float64),
            array(2, dtype=jnp.bfloat16),
            array(3, dtype=jnp.complex128),
        ],
    ),
    "of all kinds": (False, of_all_kinds),
    "one array": (False, lambda: array(7)),
    "only zero-size": (False, lambda: {"none": array(0, 3)}),
    "only integers": (False, lambda: {"integer": jnp.arange(3)}),
    "empty": (False, dict),
}


def is_gradient(path: Any, leaf: Any) -> bool:
    overwritten = "_overwrite_with_gradient" in jax.tree_util.keystr(path)
    return jnp.issubdtype(leaf.dtype, jnp.inexact) and not overwritten


def split_leaves(tree: Any) -> tuple[list[Any], list[Any]]:
    """The gradients of a tree, and its other leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    gradients = [x for path, x in leaves if is_gradient(path, x)]
    return gradients, [x for path, x in leaves if not is_gradient(path, x)]


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
