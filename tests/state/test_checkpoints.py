"""Saving and restoring: what goes on afterwards goes on bit for bit."""

import functools
import os
import pathlib
import subprocess
import sys

import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import TRANSFORMS, array, assert_same_bits, last_axes

import optaxclip

HALF = 100  # steps before the checkpoint, and after it


def unit_norm(tree):
    return optaxclip.unit_norm(tree, axis=last_axes)


def adamw():
    return optax.adamw(optax.cosine_decay_schedule(1e-2, 2 * HALF))


# Every rule with a memory, beside AdamW. Windows that are full at the checkpoint, and
# one that is not; counts that have run out, and one that has not.
ADAPTIVE = {
    "clip_by_percentile": lambda: optax.chain(
        optaxclip.clip_by_percentile(90, 30), adamw()
    ),
    "clip_by_percentile(leaf)": lambda: optax.chain(
        optaxclip.clip_by_percentile(90, 150, norm=optaxclip.leaf_norm), adamw()
    ),
    "autoclip": lambda: optax.chain(optaxclip.autoclip(10, 150), adamw()),
    "zclip": lambda: optax.chain(optaxclip.zclip(), adamw()),
    "adagc": lambda: optax.chain(optaxclip.adagc(warmup=HALF + 10), adamw()),
    "ema": lambda: optax.chain(
        optaxclip.clip_by(optaxclip.leaf_norm, optaxclip.ema(warmup=20)), adamw()
    ),
    "tracked_quantile": lambda: optax.chain(
        optaxclip.clip_by(unit_norm, optaxclip.tracked_quantile(0.9, 0.05)), adamw()
    ),
    "window_zscore": lambda: optax.chain(
        optaxclip.clip_by(optaxclip.global_norm, optaxclip.window_zscore(3.0, 40, 20)),
        adamw(),
    ),
    "skip_spikes": lambda: optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_percentile(90, 30), adamw()),
        window=40,
        min_count=20,
        watch_loss=True,
    ),
}


def start(name):
    params = {"in": array(4, 16), "bias": jnp.zeros(16), "out": array(16, 1, seed=1)}
    return params, ADAPTIVE[name]().init(params)


@functools.cache
def half_a_run(name):
    """A function that trains on from a step: spikes, and in a skip batches of NaN."""
    tx = optax.with_extra_args_support(ADAPTIVE[name]())

    def loss_of(params, x, factor):
        hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
        target = jnp.sin(jnp.sum(x, axis=1, keepdims=True))
        return factor * jnp.mean((hidden @ params["out"] - target) ** 2)

    def step(carry, i):
        params, opt_state = carry
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (32, 4))
        factor = jnp.where(i % 17 == 9, 50.0, 1.0)
        if name == "skip_spikes":
            factor = jnp.where(i % HALF == 90, jnp.nan, factor)
        loss, grads = jax.value_and_grad(loss_of)(params, x, factor)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def run(params, opt_state, first):
        return jax.lax.scan(step, (params, opt_state), first + jnp.arange(HALF))

    return run


def second_halves(path):
    """What a fresh process makes of a checkpoint."""
    template = {
        name: jax.eval_shape(lambda name=name: start(name)) for name in ADAPTIVE
    }
    with ocp.CheckpointManager(path) as checkpoints:
        restored = checkpoints.restore(HALF, args=ocp.args.StandardRestore(template))
    return {name: half_a_run(name)(*restored[name], HALF) for name in ADAPTIVE}


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def both(tmp_path_factory, compile_fast):
    """The second halves of all runs: uninterrupted, and by another process."""
    path = tmp_path_factory.mktemp("checkpoints")
    halfway, uninterrupted = {}, {}
    with jax.numpy_dtype_promotion("standard"):  # `optax.adamw` needs it
        for name in ADAPTIVE:
            halfway[name], _ = half_a_run(name)(*start(name), 0)
            uninterrupted[name] = half_a_run(name)(*halfway[name], HALF)
    with ocp.CheckpointManager(path) as checkpoints:
        checkpoints.save(HALF, args=ocp.args.StandardSave(halfway))
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),  # `cases`, too
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(compile_fast),
    }
    subprocess.run([sys.executable, __file__, path], check=True, env=found, timeout=600)
    with np.load(path / "resumed.npz") as arrays:
        resumed = {
            name: [arrays[f"{name} {i}"] for i in range(len(leaves(tree)))]
            for name, tree in uninterrupted.items()
        }
    return uninterrupted, resumed


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.sample(1)
@pytest.mark.slow
def test_a_fresh_process_goes_on_bit_for_bit(name, both):
    uninterrupted, resumed = both[0][name], both[1][name]
    assert_same_bits(resumed, leaves(uninterrupted))
    (_, opt_state), losses = uninterrupted
    report = optaxclip.metrics(opt_state)
    counts = [v for k, v in report.items() if k.endswith("clip_count")]
    assert max(counts) > 2  # the memory has been of use
    if name == "skip_spikes":
        assert report["skip_nonfinite_count"] == 2
        assert report["skip_count"] > 2
    else:
        assert np.all(np.isfinite(losses))


WITHOUT_MEMORY = ("clip_by_value", "clip_by_leaf_norm", "adaptive_grad_clip")
FLAX = ADAPTIVE | {
    name: lambda make=TRANSFORMS[name]: make(1.0) for name in WITHOUT_MEMORY
}


@pytest.mark.parametrize("make", FLAX.values(), ids=FLAX)
@pytest.mark.sample(1)
def test_flax_serialization_of_a_train_state(make):
    tx = make()
    extra = {"loss": jnp.float32(1.0)}

    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(tx).update(
                grads, opt_state, params, **extra
            )

    def create():
        return flax.training.train_state.TrainState.create(
            apply_fn=None,
            params=params,
            tx=optax.GradientTransformation(tx.init, jax.jit(update)),
        )

    params = {"w": array(4, 3), "layers": [array(3), array(3, seed=1)]}
    state = create().apply_gradients(grads=params).apply_gradients(grads=params)
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(create(), saved)
    assert_same_bits(leaves(restored), leaves(state))
    expected = state.apply_gradients(grads=params)
    actual = restored.apply_gradients(grads=params)
    assert_same_bits(leaves(actual), leaves(expected))


def test_migrate_state_starts_another_window_afresh():
    """Flax restores it whole; then the first update refuses it."""
    params = {"w": array(4, 3)}
    old, new = (optaxclip.clip_by_percentile(95, window) for window in (3, 5))
    _, state = old.update(params, old.init(params))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(new.init(params), saved)
    assert restored.rule_state.quantile_ring.shape == (3,)
    with pytest.raises(ValueError, match=r"quantile_ring of shape \(3,\).*\(5,\)"):
        new.update(params, restored)
    state = optaxclip.migrate_state(restored, new, params)
    assert_same_bits(state, new.init(params))


if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    np.savez(
        directory / "resumed.npz",
        **{
            f"{name} {i}": leaf
            for name, tree in second_halves(directory).items()
            for i, leaf in enumerate(leaves(tree))
        },
    )
