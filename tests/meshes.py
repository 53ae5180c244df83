"""One training run, to be repeated on every kind of mesh, and what it must come to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import TRANSFORMS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

# Those which measure units: within `shard_map` and `pmap` they take whole leaves only.
OF_UNITS = {
    "adaptive_grad_clip",
    "clip_by(unit_norm, lowest)",
    "clip_by(unit_norm, tracked_quantile)",
}
SKIPS = {
    "skip_nonfinite": lambda t, **kwargs: optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_percentile(90, 5, **kwargs), optax.scale(-t)),
        **kwargs,
    ),
    "skip_spikes": lambda t, **kwargs: optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_leaf_norm(t, **kwargs), optax.scale(-1.0)),
        window=4,
        min_count=2,
        **kwargs,
    ),
}
EVERY = TRANSFORMS | SKIPS
# One for each way to measure, and the skips: rules see norms that are whole already.
MEASURING = [
    "clip_by_value",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_subtree_norm",
    "clip_by_block_rms",
    "clip_by(global_norm, ord=1)",
    "clip_by(leaf_norm, ord=inf)",
    "clip_by_percentile",
    *SKIPS,
]
STEPS = 6
THRESHOLD = 0.5

SHAPES = {"kernel": (8, 16), "bias": (16,), "layers": [(16, 8), (8,)], "scalar": ()}
ONE_AXIS = {
    "kernel": P("x"),
    "bias": P(),
    "layers": [P(None, "x"), P("x")],
    "scalar": P(),
}
TWO_AXES = {
    "kernel": P("x", "y"),
    "bias": P("y"),
    "layers": [P(None, ("x", "y")), P()],
    "scalar": P(),
}


def is_shape(node):
    return isinstance(node, tuple)


def parameters():
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=is_shape,
    )


def gradients():
    """Of several steps: ordinary, a spike, one with a NaN in a single element."""
    random = np.random.default_rng(1)

    def of(shape):
        steps = random.normal(size=(STEPS, *shape))
        steps[3] *= 100
        return steps

    steps = jax.tree.map(of, SHAPES, is_leaf=is_shape)
    steps["kernel"][4, -1, -1] = np.nan  # on the last device alone
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), steps)


def run(tx, params, state, steps):
    """All steps, with the updates and the metrics of each, and the last state."""

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, (updates, optaxclip.metrics(state))

    return jax.lax.scan(step, state, steps)


@functools.cache
def expected(name):
    """The run on one device."""
    tx, params = EVERY[name](THRESHOLD), parameters()
    return jax.jit(functools.partial(run, tx))(params, tx.init(params), gradients())


def assert_same_run(actual, name):
    """Equal to rounding; whatever is counted or decided, exactly."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree_util.tree_leaves_with_path(expected(name)),
        strict=True,
    )
    for (path, x), (_, y) in pairs:
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, y, rtol=2e-5, err_msg=str(path))
        else:
            np.testing.assert_array_equal(x, y, err_msg=str(path))


def mesh(kind, *shape):
    names = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def put(tree, specs, on, leading=()):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(on, P(*leading, *spec))),
        tree,
        specs,
    )


def stacked(specs):
    """The layout of a series of trees."""
    return jax.tree.map(lambda spec: P(None, *spec), specs)


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
