"""A `shard_map` over one axis of a mesh, while the compiler shards over the other.

So trains who shards by hand over "x" (FSDP, say) and leaves "y" to JAX. Every clip,
within every skip, the loss scale and the recorder, must come to what it comes to on
one device.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from cases import TRANSFORMS
from jax.sharding import PartitionSpec as P
from meshes import KINDS, OF_UNITS, THRESHOLD, mesh, put, stacked
from meshes import gradients as all_gradients
from meshes import parameters as all_parameters

import optaxclip

LOSS_SCALE = 2.0**8
FEW = ("kernel", "bias")

# Where they lie. A kernel is shared over both axes, or whole for norms of units.
LAYOUTS = {
    "shares": {"kernel": P("x", "y"), "bias": P("y")},
    "units": {"kernel": P(None, "y"), "bias": P("y")},
}
# One for each way to measure, and for each kind of memory.
NAMES = {
    "shares": [
        "clip_by_value",
        "clip_by_leaf_norm",
        "clip_by(global_norm, ord=1)",
        "clip_by_percentile(leaf)",
        "zclip",
    ],
    "units": sorted(OF_UNITS),
}
GUARDED = ("clip_by_leaf_norm", "adaptive_grad_clip")  # any will do

# Hundreds of small programs: all of a mesh are compiled as one, and not optimized.
COMPILE_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def parameters():
    return {name: all_parameters()[name] for name in FEW}


def gradients():
    """Of six steps; the fourth is a spike, the fifth has a NaN on one device."""
    return {name: all_gradients()[name] for name in FEW}


def manual(specs):
    """The part of a layout that `shard_map` is told of."""

    def only_x(spec):
        return P(*("x" if entry == "x" else None for entry in spec))

    return jax.tree.map(only_x, specs)


def chain(name, **axis):
    adam = optax.adam(0.1)
    promotion = jax.numpy_dtype_promotion("standard")  # as optax asks
    return optax.chain(
        TRANSFORMS[name](THRESHOLD, **axis),
        optax.GradientTransformation(promotion(adam.init), promotion(adam.update)),
    )


def wrapped(name, **axis):
    """The optimizer in everything that may stand around it."""
    tx = optaxclip.skip_spikes(chain(name, **axis), window=4, min_count=2, **axis)
    tx = optaxclip.dynamic_loss_scale(tx, LOSS_SCALE, growth_interval=3, **axis)
    tx = optaxclip.record_history(tx, length=6, leaf_norms=True, **axis)

    def step(params, state, grads):
        scale = optaxclip.loss_scale(state)
        grads = jax.tree.map(lambda g: scale * g, grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def guarded(name, **axis):
    """The step that owns its parameters, with a skip by the norms of leaves."""
    rule = optaxclip.window_zscore(window=4, min_count=2)
    tx = optaxclip.guarded_step(chain(name, **axis), optaxclip.leaf_norm, rule, **axis)

    def step(params, state, grads):
        return tx.step(grads, params, state)

    return tx, step


def optimizers(group, **axis):
    """All of a group, as pairs of an optimizer and its step."""
    pairs = {name: wrapped(name, **axis) for name in NAMES[group]}
    guards = {name: guarded(name, **axis) for name in NAMES[group] if name in GUARDED}
    return pairs | {f"guarded_step of {name}": guards[name] for name in guards}


def initial(pairs, params):
    def init(params):
        return {name: tx.init(params) for name, (tx, _) in pairs.items()}

    return jax.jit(init, compiler_options=COMPILE_FAST)(params)


def run(pairs, params, states, series):
    """What each optimizer makes of parameters and state in six steps, and reports."""

    def train(step, state):
        def one(carry, grads):
            return step(*carry, grads), None

        params_and_state, _ = jax.lax.scan(one, (params, state), series)
        return *params_and_state, optaxclip.metrics(params_and_state[1])

    return {name: train(step, states[name]) for name, (_, step) in pairs.items()}


@functools.cache
def on_one_device(group):
    pairs = optimizers(group)
    program = jax.jit(functools.partial(run, pairs), compiler_options=COMPILE_FAST)
    return program(parameters(), initial(pairs, parameters()), gradients())


def on_a_mesh(group, kind, axis):
    on, specs, pairs = (
        mesh(KINDS[kind], 4, 2),
        LAYOUTS[group],
        optimizers(group, **axis),
    )
    with jax.set_mesh(on):
        params = put(parameters(), specs, on)
        series = put(gradients(), specs, on, leading=(None,))
        states = initial(pairs, params)
        at = {name: layout(tx, states[name], specs) for name, (tx, _) in pairs.items()}
        program = jax.shard_map(
            functools.partial(run, pairs),
            in_specs=(manual(specs), manual(at), manual(stacked(specs))),
            out_specs={name: (manual(specs), manual(at[name]), P()) for name in at},
            axis_names={"x"},
            check_vma=not axis,
        )
        return jax.jit(program, compiler_options=COMPILE_FAST)(params, states, series)


def layout(tx, state, specs):
    """Moments lie as the parameters do; the rest is the same everywhere."""
    return optax.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )


@pytest.mark.parametrize("told", [False, True], ids=["checked", "told"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", NAMES)
@pytest.mark.sample(1)
def test_as_on_one_device(group, kind, told):
    """Numbers to rounding; whatever is counted or decided, exactly."""
    over_x = jax.tree.map(lambda spec: "x" if "x" in spec else None, LAYOUTS[group])
    actual = on_a_mesh(group, kind, {"axis_name": over_x} if told else {})
    leaves = map(jax.tree_util.tree_leaves_with_path, (actual, on_one_device(group)))
    for (path, x), (_, y) in zip(*leaves, strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, y, rtol=5e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_steps_of_every_kind_are_among_them():
    """Made and clipped; skipped for a spike; skipped for a NaN on one device."""
    results = on_one_device("shares")
    history = results["clip_by_leaf_norm"][1].history
    np.testing.assert_array_equal(history.history_clipped, [1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(history.history_skipped, [0, 0, 0, 1, 1, 0])
    _, _, metrics = results["guarded_step of clip_by_leaf_norm"]
    assert (metrics["skip_count"], metrics["skip_nonfinite_count"]) == (2, 1)
