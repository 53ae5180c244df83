"""What it costs to read metrics: every step, a step late, or by a log.

    python benchmarks/fetch.py
    python benchmarks/fetch.py --width 2048 --batch 256    # on an accelerator

One model is trained in each of these ways, in turn, round by round, so that whatever
else the machine does meets all of them. The host makes a batch for every step, which it
can do while the device computes, unless it waits for a metric.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip.audit import ClipLog


class Training:
    """A multilayer perceptron under a percentile clip and AdamW."""

    def __init__(self, width, batch, layers, length=None):
        tx = optax.chain(optaxclip.clip_by_percentile(), optax.adamw(1e-3))
        tx = optaxclip.record_history(tx, length) if length else tx
        rng = np.random.default_rng(0)
        kernels = rng.normal(0, width**-0.5, (layers, width, width))
        self.params = list(jnp.asarray(kernels, jnp.float32))
        self.opt_state = tx.init(self.params)
        self.shape, self.rng = (batch, width), rng

        def loss(params, x):
            y = functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x)
            return jnp.mean((y - x) ** 2)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, x):
            updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, optaxclip.metrics(opt_state)

        self._step = step

    def step(self):
        """Dispatches a step and returns its metrics, on device."""
        x = self.rng.standard_normal(self.shape, np.float32)
        self.params, self.opt_state, metrics = self._step(
            self.params, self.opt_state, x
        )
        return metrics


def floats(metrics):
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def never(training, steps):
    for _ in range(steps):
        training.step()


def every_step(training, steps):
    for _ in range(steps):
        floats(training.step())


def a_step_late(training, steps):
    held = training.step()
    for _ in range(steps - 1):
        metrics = training.step()
        floats(held)
        held = metrics
    floats(held)


def by_log(log, training, steps):
    never(training, steps)
    log.update(training.opt_state)


def seconds(read, training, steps):
    start = time.perf_counter()
    read(training, steps)
    jax.block_until_ready(training.params)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=256, help="of every layer")
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--steps", type=int, default=100, help="in a round")
    parser.add_argument("--rounds", type=int, default=11, help="of which the median")
    args = parser.parse_args()
    make = functools.partial(Training, args.width, args.batch, args.layers)
    log = ClipLog(pathlib.Path(tempfile.mkdtemp(), "clip.jsonl"))
    ways = {
        "never": (never, make()),
        "every step": (every_step, make()),
        "a step late": (a_step_late, make()),
        f"by a log every {args.steps}": (
            functools.partial(by_log, log),
            make(args.steps),
        ),
    }
    times = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, (read, training) in ways.items():
            times[name].append(seconds(read, training, args.steps) / args.steps)
    device = jax.devices()[0]
    print(
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {vars(args)}"
    )
    print(f"{'metrics are read':20} ms/step   / never")
    for name, measured in times.items():
        ratios = [x / y for x, y in zip(measured, times["never"], strict=True)][1:]
        milliseconds = 1e3 * statistics.median(measured[1:])  # the first compiles
        print(f"{name:20} {milliseconds:7.3f} {statistics.median(ratios):9.2f}")


if __name__ == "__main__":
    main()
