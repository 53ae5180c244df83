"""Every transform in the loops that people write gives what the plain loop gives."""

import functools

import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ONE_OF_EACH, TRANSFORMS, array
from flax import nnx

import optaxclip

KERNEL, BIAS, OUT = array(4, 3), array(3), array(3, 1, seed=1)
FACTORS = [1.0, 0.1, 1.0, 10.0, 1.0, 0.1, 1e3, 1.0, 0.3, 1.0]  # of the losses
BATCHES = [(array(8, 4, seed=i), jnp.float32(f)) for i, f in enumerate(FACTORS)]


def optimizer():
    return optax.chain(optax.trace(0.9), optax.scale(-0.001))


OPTIMIZERS = {
    name: lambda make=make: optax.chain(make(0.5), optimizer())
    for name, make in ONE_OF_EACH.items()
} | {
    "adagc()": lambda: optax.chain(optaxclip.adagc(warmup=3), optimizer()),
    "skip_nonfinite": lambda: optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_percentile(window=4), optimizer())
    ),
    "skip_spikes": lambda: optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_leaf_norm(0.5), optimizer()),
        window=4,
        min_count=2,
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def all_at_once(optimizers=OPTIMIZERS):
    """Every optimizer on the same gradients, their updates added up: one program."""
    transforms = {name: make() for name, make in optimizers.items()}

    def init(params):
        return {name: tx.init(params) for name, tx in transforms.items()}

    def update(updates, state, params=None):
        results = {
            name: tx.update(updates, state[name], params)
            for name, tx in transforms.items()
        }
        total = functools.reduce(optax.tree.add, [each for each, _ in results.values()])
        return total, {name: new for name, (_, new) in results.items()}

    return optax.GradientTransformation(init, update)


def forward(kernel, bias, out, x):
    return jnp.tanh(x @ kernel + bias[None]) @ out


def loss_of(prediction, batch):
    x, factor = batch
    return factor * jnp.mean((prediction - jnp.sum(x, axis=1, keepdims=True)) ** 2)


def counted(step):
    """A step, and the list of its traces."""
    traces = []

    @functools.wraps(step)
    def traced(*args):
        traces.append(1)
        return step(*args)

    return traced, traces


def told(i, state):
    """The metrics of every third step."""
    return [jax.device_get(optaxclip.metrics(state))] if i % 3 == 0 else []


# A loop takes an optimizer, and gives the parameters at the end (kernel, bias, out) and
# metrics on the way. It must trace its step once.


def plain(tx, batches=BATCHES):
    def step(params, opt_state, batch):
        def loss_fn(params):
            return loss_of(forward(*params, batch[0]), batch)

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = (KERNEL, BIAS, OUT)
    opt_state, reports, step = tx.init(params), [], jax.jit(step)
    for i, batch in enumerate(batches):
        params, opt_state = step(params, opt_state, batch)
        reports += told(i, opt_state)
    return params, reports


def donated(tx):
    """Nested dicts as Haiku has them, and a step that reuses its buffers."""

    def step(params, opt_state, batch):
        def loss_fn(params):
            hidden, out = params["net/~/linear"], params["net/~/linear_1"]["w"]
            return loss_of(forward(hidden["w"], hidden["b"], out, batch[0]), batch)

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {
        "net/~/linear": {"w": jnp.copy(KERNEL), "b": jnp.copy(BIAS)},
        "net/~/linear_1": {"w": jnp.copy(OUT)},
    }
    step, traces = counted(step)
    opt_state, reports = tx.init(params), []
    step = jax.jit(step, donate_argnums=(0, 1))
    for i, batch in enumerate(BATCHES):
        before, state_before = jax.tree.leaves(params), jax.tree.leaves(opt_state)
        params, opt_state = step(params, opt_state, batch)
        assert all(leaf.is_deleted() for leaf in before)
        assert any(leaf.is_deleted() for leaf in state_before)  # the others not read
        reports += told(i, opt_state)
    assert len(traces) == 1
    hidden = params["net/~/linear"]
    return (hidden["w"], hidden["b"], params["net/~/linear_1"]["w"]), reports


class NNX(nnx.Module):
    def __init__(self):
        self.kernel, self.bias = nnx.Param(KERNEL), nnx.Param(BIAS)
        self.out = nnx.Param(OUT)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))  # no parameter

    def __call__(self, x):
        self.calls[...] += 1
        return forward(self.kernel[...], self.bias[...], self.out[...], x)


def flax_nnx(tx):
    model = NNX()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer, batch):
        grads = nnx.grad(lambda model: loss_of(model(batch[0]), batch))(model)
        optimizer.update(model, grads)

    step, traces = counted(step)
    step, reports = nnx.jit(step), []
    for i, batch in enumerate(BATCHES):
        step(model, optimizer, batch)
        reports += told(i, optimizer)
    assert len(traces) == 1
    assert int(model.calls[...]) == int(optimizer.step[...]) == len(BATCHES)
    return (model.kernel[...], model.bias[...], model.out[...]), reports


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        names = {"kernel": KERNEL, "bias": BIAS, "out": OUT}
        return forward(
            *(self.param(k, lambda _, v=v: jnp.copy(v)) for k, v in names.items()), x
        )


def flax_linen(tx):
    model = Linen()

    def step(state, batch):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, batch[0]), batch)

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    step, traces = counted(step)
    step = jax.jit(step)
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), BATCHES[0][0])["params"],
        tx=tx,
    )
    state = state.replace(step=jnp.zeros((), jnp.int32))  # a Python int would retrace
    reports = []
    for i, batch in enumerate(BATCHES):
        state = step(state, batch)
        reports += told(i, state)
    assert len(traces) == 1
    return tuple(state.params[name] for name in ("kernel", "bias", "out")), reports


def equinox(tx):
    """Filtered trees: ``None`` in place of all that is no array."""
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        kernel: jax.Array
        bias: jax.Array
        out: jax.Array
        activation: object
        size: int

        def __call__(self, x):
            return self.activation(x @ self.kernel + self.bias[None]) @ self.out

    def step(model, opt_state, batch):
        grads = eqx.filter_grad(lambda model: loss_of(model(batch[0]), batch))(model)
        params, _ = eqx.partition(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    step, traces = counted(step)
    step = eqx.filter_jit(step)
    model = Model(KERNEL, BIAS, OUT, jnp.tanh, 3)
    opt_state, reports = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for i, batch in enumerate(BATCHES):
        model, opt_state = step(model, opt_state, batch)
        reports += told(i, opt_state)
    assert len(traces) == 1
    assert (model.activation, model.size) == (jnp.tanh, 3)
    return (model.kernel, model.bias, model.out), reports


@functools.cache
def expected():
    return jax.device_get(plain(all_at_once()))


@every_optimizer
@pytest.mark.sample(1)
def test_the_plain_loop_clips_some_steps(name):
    params, reports = expected()
    assert all(np.all(np.isfinite(x)) for x in params)
    counts, steps, thresholds = (
        [
            float(value)
            for report in reports
            for key, value in report.items()
            if key.startswith(f"{name}/") and key.endswith(f"/{end}")
        ]
        for end in ("clip_count", "step_count", "clip_threshold")
    )
    assert 0 < counts[-1] <= steps[-1]
    assert {0.5, *thresholds} - {np.inf} == {0.5} or len(set(thresholds)) > 1
    if name == "skip_spikes":
        assert reports[-1][f"{name}/skip_count"] > 0


@pytest.mark.parametrize(
    "loop", [donated, flax_nnx, flax_linen, equinox], ids=lambda f: f.__name__
)
@pytest.mark.sample(1)
def test_every_loop_gives_what_the_plain_loop_gives(loop):
    params, reports = loop(all_at_once())
    expected_params, expected_reports = expected()
    for x, y in zip(params, expected_params, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)
    for report, like in zip(reports, expected_reports, strict=True):
        assert report.keys() == like.keys()
        for key in like:
            np.testing.assert_allclose(report[key], like[key], rtol=2e-5, err_msg=key)


# Skips that own the parameters, and arguments beside the gradients


def spoilt(batches):
    x, _ = batches[4]
    return [*batches[:4], (x, jnp.float32(np.nan)), *batches[5:]]


def guarded_in_nnx(guarded, batches):
    model = NNX()
    opt_state = guarded.init(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, opt_state, batch):
        grads = nnx.grad(lambda model: loss_of(model(batch[0]), batch))(model)
        params = nnx.state(model, nnx.Param)
        params, opt_state = guarded.step(grads, params, opt_state)
        nnx.update(model, params)
        return opt_state

    for batch in batches:
        opt_state = step(model, opt_state, batch)
    return (model.kernel[...], model.bias[...], model.out[...]), opt_state


def guarded_in_linen(guarded, batches):
    model = Linen()
    params = model.init(jax.random.key(0), batches[0][0])["params"]
    tx = optax.GradientTransformation(guarded.init, optax.identity().update)
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
    )

    @jax.jit
    def step(state, batch):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, batch[0]), batch)

        params, opt_state = guarded.step(
            jax.grad(loss_fn)(state.params), state.params, state.opt_state
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for batch in batches:
        state = step(state, batch)
    names = ("kernel", "bias", "out")
    return tuple(state.params[name] for name in names), state.opt_state


@pytest.mark.parametrize("loop", [guarded_in_nnx, guarded_in_linen])
def test_a_guarded_step_in_flax_is_a_skip(loop):
    inner = optax.chain(optaxclip.clip_by_percentile(window=4), optimizer())
    params, opt_state = loop(optaxclip.guarded_step(inner), spoilt(BATCHES))
    expected_params, reports = plain(optaxclip.skip_nonfinite(inner), spoilt(BATCHES))
    assert reports[-1]["skip_count"] == 1
    for x, y in zip(params, expected_params, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5)
    report = optaxclip.metrics(opt_state)
    for key, value in reports[-1].items():
        np.testing.assert_allclose(report[key], value, rtol=2e-5, err_msg=key)


def watching():
    return optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_global_norm(0.5), optimizer()),
        window=4,
        min_count=2,
        watch_loss=True,
    )


def test_an_nnx_optimizer_hands_on_the_loss():
    model = NNX()
    optimizer = nnx.Optimizer(model, watching(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss_fn = nnx.value_and_grad(lambda model: loss_of(model(batch[0]), batch))
        loss, grads = loss_fn(model)
        optimizer.update(model, grads, loss=loss)
        return optaxclip.metrics(optimizer)["skip_count"]

    counts = [int(step(model, optimizer, batch)) for batch in spoilt(BATCHES)]
    assert counts == loss_watched_in_a_train_state(spoilt(BATCHES))
    assert counts[:6] == [0, 0, 0, 1, 2, 2]  # the spike of 10, and NaN


def loss_watched_in_a_train_state(batches):
    """``apply_gradients`` has no argument for a loss; three lines do what it does."""
    model = Linen()
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), batches[0][0])["params"],
        tx=watching(),
    )

    @jax.jit
    def step(state, batch):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, batch[0]), batch)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, loss=loss
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    counts = []
    for batch in batches:
        state = step(state, batch)
        counts.append(int(optaxclip.metrics(state)["skip_count"]))
    return counts


def test_apply_gradients_without_the_loss_says_what_to_call():
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=(KERNEL, BIAS, OUT), tx=watching()
    )
    with pytest.raises(ValueError, match=r"`loss` is None: call `update\(.*loss=loss"):
        state.apply_gradients(grads=state.params)


# Another threshold while training, without another trace


def injected(**hyperparams):
    clip = optax.inject_hyperparams(optaxclip.clip_by_global_norm)
    return optax.chain(clip(**hyperparams), optax.sgd(0.1))


def in_a_plain_loop(tx, assign):
    def update(grads, opt_state):
        return tx.update(grads, opt_state, GRADS)

    update, traces = counted(update)
    update, opt_state = jax.jit(update), tx.init(GRADS)
    for i in range(10):
        assign(i, opt_state)
        _, opt_state = update(GRADS, opt_state)
        yield opt_state
    assert len(traces) == 1


def in_a_train_state(tx, assign):
    def apply(state):
        return state.apply_gradients(grads=GRADS)

    apply, traces = counted(apply)
    apply = jax.jit(apply)
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=GRADS, tx=tx
    ).replace(step=jnp.zeros((), jnp.int32))
    for i in range(10):
        assign(i, state.opt_state)
        state = apply(state)
        yield state
    assert len(traces) == 1


def in_nnx(tx, assign):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), nnx.state(model))
        optimizer.update(model, grads)

    step, traces = counted(step)
    step = nnx.jit(step)
    for i in range(10):
        assign(i, optimizer.opt_state)
        step(model, optimizer)
        yield optimizer
    assert len(traces) == 1


GRADS = {"w": jnp.full((3, 2), 3.0, jnp.float32)}  # a weak type would retrace
WANTED = [1.0] * 3 + [0.25] * 4 + [2.0] * 3
every_loop = pytest.mark.parametrize(
    "loop", [in_a_plain_loop, in_a_train_state, in_nnx]
)


@every_loop
def test_a_threshold_is_assigned_while_training(loop):
    def assign(i, opt_state):
        hyperparams = opt_state[0].hyperparams
        if loop is in_nnx:
            hyperparams["max_norm"][...] = WANTED[i]  # a variable
        else:
            hyperparams["max_norm"] = jnp.float32(WANTED[i])

    thresholds = [
        float(optaxclip.metrics(state)["clip_threshold"])
        for state in loop(injected(max_norm=1.0), assign)
    ]
    assert thresholds == WANTED


@every_loop
@pytest.mark.parametrize("by", ["argument", "inject_hyperparams"])
def test_a_threshold_follows_a_schedule(loop, by):
    def schedule(step):
        return jnp.asarray(WANTED)[step]

    by_argument = optax.chain(optaxclip.clip_by_global_norm(schedule), optax.sgd(0.1))
    tx = by_argument if by == "argument" else injected(max_norm=schedule)
    reports = [optaxclip.metrics(state) for state in loop(tx, lambda *_: None)]
    assert [float(report["clip_threshold"]) for report in reports] == WANTED
    np.testing.assert_allclose([r["clipped_grad_norm"] for r in reports], WANTED)


@pytest.mark.parametrize(
    ("make", "static", "argument", "values"),
    [
        (
            optaxclip.clip_by_percentile,
            ("window", "min_count", "norm", "ramp"),
            "factor",
            (10.0, 0.5),
        ),
        (optaxclip.zclip, ("warmup", "norm"), "z_threshold", (50.0, 1e-3)),
        (optaxclip.adaptive_grad_clip, (), "clipping", (10.0, 0.5)),
    ],
    ids=["clip_by_percentile", "zclip", "adaptive_grad_clip"],
)
def test_an_adaptive_clip_is_tightened_while_training(make, static, argument, values):
    first, second = map(jnp.float32, values)
    given = {optaxclip.zclip: {"warmup": 2}, optaxclip.clip_by_percentile: {"ramp": 0}}
    given = given.get(make, {})
    tx = optax.inject_hyperparams(make, static_args=static)(
        **given, **{argument: float(first)}
    )
    params = jnp.array([[1.0], [2.0]])
    update, traces = counted(lambda g, state: tx.update(g, state, params))
    update, state, counts = jax.jit(update), tx.init(params), []
    for i, size in enumerate([1.0, 1.2, 1.1, 1.15, 1.18] * 4):
        if i == 10:
            state.hyperparams[argument] = second
        _, state = update(size * params, state)
        counts.append(int(optaxclip.metrics(state)["clip_count"]))
    assert counts[-1] - counts[9] > counts[9] + 3
    assert len(traces) == 1


# Long


LONG = OPTIMIZERS | {
    name: lambda make=make: optax.chain(make(0.5), optimizer())
    for name, make in TRANSFORMS.items()
}


@pytest.fixture(scope="module")
def long_run():
    """10,000 steps with gradients of all sizes: what it starts with and ends with."""
    tx = all_at_once(LONG)
    params = {"w": KERNEL, "b": BIAS}

    def step(carry, i):
        params, opt_state = carry
        spike = jnp.where(i % 1000 == 999, 1e4, 1.0)
        size = jnp.exp(jnp.sin(i.astype(jnp.float32) * 0.7)) * spike
        grads = jax.tree.map(lambda p: size * jnp.sign(p + 1e-3), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    start = (params, tx.init(params))
    end, _ = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(10_000)))()
    return start, end


@pytest.mark.parametrize("name", LONG)
@pytest.mark.sample(1)
def test_ten_thousand_steps_of_a_scan(name, long_run):
    """Counters and windows come round; nothing drifts, overflows or changes form."""
    start, (params, states) = long_run
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))
    end = states[name]
    assert jax.eval_shape(lambda: end) == jax.eval_shape(lambda: start[1][name])
    report = optaxclip.metrics(end)
    skipped = int(report.get("skip_count", 0))
    assert skipped < 1000
    for key, value in report.items():
        if key.endswith("step_count"):
            assert int(value) == 10_000 - skipped
        if key.endswith("nonfinite_count"):
            assert int(value) == 0
    counts = [int(v) for k, v in report.items() if k.endswith("clip_count")]
    assert skipped + max(counts) >= 10  # each spike at least
