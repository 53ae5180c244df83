"""Mean over devices, unscale, accumulate, clip, optimizer: as one step on one device.

Each way to train in docs/how_to/several_devices.md runs on eight devices, or in
micro-batches, and has to end where one device and one batch end: parameters to
rounding, decisions exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import array, assert_same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

PARAMS = {"w": array(16, 8), "b": array(8, seed=1)}
# Sizes of batches whose gradients are ordinary, large, huge, bad, small, ordinary.
SIZES = [1.0, 1.0, 3.0, 100.0, np.nan, 0.1, 1.0, 1.0]


def momentum():
    return optax.sgd(1e-2, momentum=0.9)


# A clip lets NaN through, as optax does: only the guarded ones get the bad batch.
TRANSFORMS = {
    "clip_by_global_norm": lambda **axis: optax.chain(
        optaxclip.clip_by_global_norm(28.0, **axis), momentum()
    ),
    "clip_by_leaf_norm": lambda **axis: optax.chain(
        optaxclip.clip_by_leaf_norm(26.0, **axis), momentum()
    ),
    "clip_by_percentile": lambda **axis: optax.chain(
        optaxclip.clip_by_percentile(50, 4, **axis), momentum()
    ),
    "skip_nonfinite": lambda **axis: optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_percentile(50, 4, **axis), momentum()), **axis
    ),
    "dynamic_loss_scale": lambda **axis: optaxclip.dynamic_loss_scale(
        optax.chain(optaxclip.clip_by_global_norm(28.0, **axis), momentum()),
        init_scale=2.0**10,
        growth_interval=2,
        **axis,
    ),
}
GUARDED = ("skip_nonfinite", "dynamic_loss_scale")
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def batches(name):
    """Of 32 examples; a bad one has a single NaN, and so on a single device."""
    for seed, size in enumerate(SIZES):
        x = array(32, 16, seed=seed)
        y = array(32, 8, seed=seed + 50) * (1 if np.isnan(size) else size)
        if np.isnan(size) and name not in GUARDED:
            continue
        yield x, y.at[13, 2].set(np.nan) if np.isnan(size) else y


def mean_loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"][None] - y) ** 2, axis=1))


def scaled_loss(params, batch, state):
    """Times the loss scale, if there is one."""
    loss = mean_loss(params, batch)
    is_scaled = isinstance(state, optaxclip.LossScaleState)
    return optaxclip.loss_scale(state) * loss if is_scaled else loss


def stepped(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, optaxclip.metrics(state)


def train(step, params, state, stream):
    """The parameters and the metrics after every step, in NumPy."""
    for batch in stream:
        params, state, report = step(params, state, batch)
        yield jax.device_get((params, report))


def assert_same_training(actual, expected):
    """Decisions are the same, and everything else to rounding."""
    for (params, report), (expected_params, expected_report) in zip(
        actual, expected, strict=True
    ):
        assert report.keys() == expected_report.keys()
        for name, value in report.items():
            if value.dtype == np.int32 or name == "loss_scale":
                np.testing.assert_array_equal(value, expected_report[name], name)
            np.testing.assert_allclose(
                value, expected_report[name], rtol=1e-5, err_msg=name
            )
        for x, y in zip(
            jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@functools.cache
def on_one_device(name):
    tx = TRANSFORMS[name]()

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(scaled_loss)(params, batch, state)
        return stepped(tx, grads, state, params)

    return list(train(step, PARAMS, tx.init(PARAMS), batches(name)))


@every_transform
@pytest.mark.sample(1)
def test_the_reference_decides_both_ways(name):
    """Else the tests below would compare nothing."""
    _, report = on_one_device(name)[-1]
    assert 0 < report["clip_count"] < report["step_count"]
    bad = [int(report[k]) for k in ("skip_count", "overflow_count") if k in report]
    assert bad == ([1] if name in GUARDED else [])
    assert report["step_count"] == 7


# Data parallel


@every_transform
@pytest.mark.sample(1)
def test_pmap_and_pmean(name):
    tx = TRANSFORMS[name](axis_name=())  # averaged, so whole on every device

    @functools.partial(jax.pmap, axis_name="data")
    def step(params, state, batch):
        grads = jax.grad(scaled_loss)(params, batch, state)
        return stepped(tx, jax.lax.pmean(grads, "data"), state, params)

    def replicated(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * 8), tree)

    def shared(batch):
        return jax.tree.map(lambda x: x.reshape(8, 4, -1), batch)

    stream = map(shared, batches(name))
    training = list(
        train(step, replicated(PARAMS), replicated(tx.init(PARAMS)), stream)
    )
    for device in range(8):
        one = jax.tree.map(lambda x, i=device: x[i], training)
        assert_same_training(one, on_one_device(name))
        assert_same_bits(one, jax.tree.map(lambda x: x[0], training))


@every_transform
@pytest.mark.sample(1)
def test_shard_map(name):
    """Gradients of whole parameters are summed over the devices by autodiff."""
    tx = TRANSFORMS[name]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P(), P()),
    )
    def step(params, state, batch):
        def loss(params):
            return jax.lax.pmean(scaled_loss(params, batch, state), "data")

        return stepped(tx, jax.grad(loss)(params), state, params)

    training = train(step, PARAMS, tx.init(PARAMS), batches(name))
    assert_same_training(training, on_one_device(name))


def test_shard_map_without_the_mean_sums_and_pmean_changes_nothing():
    """What the recipe for `shard_map` is there to avoid."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = next(batches("clip_by_global_norm"))

    def gradient(mean_of_loss, mean_of_gradient):
        def local(params, batch):
            def loss(params):
                loss = mean_loss(params, batch)
                return jax.lax.pmean(loss, "data") if mean_of_loss else loss

            grads = jax.grad(loss)(params)
            return jax.lax.pmean(grads, "data") if mean_of_gradient else grads

        specs = (P(), P("data"))
        whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(whole)(PARAMS, batch)["b"]

    expected = jax.grad(mean_loss)(PARAMS, batch)["b"]
    for mean_of_loss, mean_of_gradient, factor in [
        (True, False, 1),
        (True, True, 1),
        (False, False, 8),
        (False, True, 8),
    ]:
        grads = gradient(mean_of_loss, mean_of_gradient)
        np.testing.assert_allclose(grads, factor * expected, rtol=1e-4)


def jitted(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.grad(scaled_loss)(params, batch, state)
        return stepped(tx, grads, state, params)

    return step


def placed(mesh, spec, tree):
    # A copy: steps donate what they are given, and every test starts from PARAMS.
    return jax.tree.map(
        lambda x: jax.device_put(jnp.copy(x), NamedSharding(mesh, spec)), tree
    )


@every_transform
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.sample(1)
def test_jit_with_a_sharded_batch(name, kind):
    tx = TRANSFORMS[name]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = placed(mesh, P(), PARAMS)
        stream = (placed(mesh, P("data"), batch) for batch in batches(name))
        training = train(jitted(tx), params, jax.jit(tx.init)(params), stream)
        assert_same_training(training, on_one_device(name))


# Sharded parameters


def specs_of(tx, state, params):
    """Moments lie where their parameters lie, everything else on every device."""
    return optax.tree_map_params(
        tx,
        lambda x, param: P("data"),
        state,
        params,
        transform_non_params=lambda _: P(),
    )


@every_transform
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.sample(1)
def test_jit_with_sharded_parameters_and_state(name, kind):
    tx = TRANSFORMS[name]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharded = NamedSharding(mesh, P("data"))

    def moments(state):
        return jax.tree.leaves(optax.tree.get(state, "trace"))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        def loss(params):
            if kind == AxisType.Explicit:  # where nothing is gathered unasked
                params = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)
            return scaled_loss(params, batch, state)

        return stepped(tx, jax.grad(loss)(params), state, params)

    with jax.set_mesh(mesh):
        params = placed(mesh, P("data"), PARAMS)
        specs = specs_of(tx, jax.eval_shape(tx.init, params), params)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        assert all(x.sharding.is_equivalent_to(sharded, x.ndim) for x in moments(state))
        training = []
        for batch in batches(name):
            batch = placed(mesh, P("data"), batch)
            params, state, report = step(params, state, batch)
            training.append(jax.device_get((params, report)))
            for x in (*moments(state), *params.values()):
                assert x.sharding.is_equivalent_to(sharded, x.ndim)
        assert_same_training(training, on_one_device(name))


@every_transform
@pytest.mark.sample(1)
def test_shard_map_with_sharded_parameters_and_state(name):
    """Gathered for the loss; the gradient of that is summed and scattered."""
    tx = TRANSFORMS[name]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = placed(mesh, P("data"), PARAMS)
    specs = specs_of(tx, jax.eval_shape(tx.init, params), params)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), specs, P("data")),
        out_specs=(P("data"), specs, P()),
    )
    def step(shares, state, batch):
        def loss(shares):
            gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
            params = jax.tree.map(gather, shares)
            return jax.lax.pmean(scaled_loss(params, batch, state), "data")

        return stepped(tx, jax.grad(loss)(shares), state, shares)

    training = train(step, params, tx.init(params), batches(name))
    assert_same_training(training, on_one_device(name))


# Accumulation


def accumulated(tx, steps):
    """`optax.MultiSteps`, which needs the standard promotion of dtypes."""
    tx = optax.MultiSteps(tx, steps).gradient_transformation()
    promotion = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformationExtraArgs(tx.init, promotion(tx.update))


def micro_batches(batch, count=4):
    parts = [jnp.split(x, count) for x in batch]
    return list(zip(*parts, strict=True))


def last_of(training, count=4):
    return [x for i, x in enumerate(training) if i % count == count - 1]


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n not in GUARDED])
@pytest.mark.sample(1)
def test_micro_batches(name):
    """Four of them are one batch, and one step for every counter and every rule."""
    tx = accumulated(TRANSFORMS[name](), 4)
    stream = [micro for batch in batches(name) for micro in micro_batches(batch)]
    params = jax.tree.map(jnp.copy, PARAMS)
    training = train(jitted(tx), params, tx.init(params), stream)
    assert_same_training(last_of(training), on_one_device(name))


@pytest.mark.parametrize("scaled", [False, True], ids=["skip", "loss scale"])
def test_a_bad_micro_batch_is_left_out_and_its_step_waits_for_another(scaled):
    clip = "clip_by_global_norm"
    tx = accumulated(TRANSFORMS[clip](), 4)
    if scaled:
        tx = optaxclip.dynamic_loss_scale(tx, 2.0**10, growth_interval=3)
    else:
        tx = optaxclip.skip_nonfinite(tx)
    step, state = jitted(tx), tx.init(PARAMS)
    params, training = jax.tree.map(jnp.copy, PARAMS), []
    for i, batch in enumerate(batches(clip)):
        micros = micro_batches(batch)
        bad = jax.tree.map(lambda x: x * jnp.inf, micros[0])
        for micro in [*micros[: i % 4], bad, *micros[i % 4 :]]:
            params, state, report = step(params, state, micro)
        assert report["overflow_count" if scaled else "skip_count"] == i + 1
        clips = {k: report[k] for k in on_one_device(clip)[0][1]}
        training.append(jax.device_get((params, clips)))
    assert_same_training(training, on_one_device(clip))


# Beside the optimizer


def adamw(weight_decay):
    tx = optax.adamw(0.1, weight_decay=weight_decay)
    promotion = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformationExtraArgs(
        promotion(tx.init), promotion(tx.update)
    )


def test_decoupled_weight_decay_is_not_clipped():
    """A clip before AdamW bounds gradients alone, one after L2 decay its sum."""
    params = jax.tree.map(lambda x: 100 * x, PARAMS)
    clip = optaxclip.clip_by_global_norm(1e-3)

    def updates(*transforms):
        tx = optax.chain(*transforms)
        return tx.update(PARAMS, tx.init(params), params)[0]

    decayed = updates(clip, adamw(weight_decay=0.5))
    not_decayed = updates(clip, adamw(weight_decay=0.0))
    for name, param in params.items():
        np.testing.assert_allclose(
            decayed[name] - not_decayed[name], -0.1 * 0.5 * param, rtol=1e-4
        )
    coupled = updates(optax.add_decayed_weights(0.5), clip)
    np.testing.assert_allclose(optaxclip.global_norm(coupled), 1e-3, rtol=1e-6)


def test_a_clip_after_the_optimizer_bounds_the_update():
    tx = optax.chain(adamw(weight_decay=0.5), optaxclip.clip_by_global_norm(0.01))
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    alone = adamw(weight_decay=0.5)
    expected, _ = alone.update(PARAMS, alone.init(PARAMS), PARAMS)
    norm = optaxclip.metrics(state)["grad_norm"]  # of what the optimizer made
    np.testing.assert_allclose(norm, optaxclip.global_norm(expected), rtol=1e-6)
    assert norm > 0.1
    np.testing.assert_allclose(optaxclip.global_norm(updates), 0.01, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], expected["w"] * 0.01 / norm, rtol=1e-5)
