"""A denoising diffusion model of handwritten digits, in bfloat16, and one bad batch.

    pip install "optaxclip[examples]"
    python diffusion.py    # three runs, a table, a picture, reports: minutes on a CPU
    python diffusion.py --clip percentile,skip --bad-factor nan    # a batch of NaN
    python diffusion.py --bad-step -1 --steps 20000 --width 512    # on an accelerator

A small residual network (Flax NNX) learns to tell the noise from the digit, and draws
digits from nothing but noise. Activations and gradients are bfloat16. The gradients
are taken with respect to a bfloat16 copy of the parameters; the parameters themselves
stay float32. To draw digits, the network uses an average of the parameters over the
last steps.

One batch has pixels that are a thousand times too large, as if somebody had forgotten
to normalize it. Every optimizer gets the same model, the same data and the same bad
batch. With `--seeds 3`, this is the result:

clip       loss before bad     just after          final  clipped  skipped  largest norm
none         0.237 ± 0.002  0.313 ± 0.009  0.211 ± 0.001     0.0%      0.0         491.7
global 1     0.236 ± 0.001  0.231 ± 0.001  0.203 ± 0.001     0.4%      0.0         492.9
percentile   0.231 ± 0.001  0.226 ± 0.001  0.204 ± 0.001     4.7%      0.0         517.7

The suffix of a name lists the axes of its array: B batch, N images, P pixels, D width,
F waves, S seeds, V validations.
"""

import argparse
import csv
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn import datasets
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, LogData, read, report


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile"  # runs to make, from CLIPS
    seeds: int = 1  # repeat every run with this many seeds
    bad_step: int = 500  # the step whose batch is bad; -1 for none
    bad_factor: float = 1000.0  # what its pixels are multiplied by; may be nan
    max_norm: float = 1.0  # global: largest norm of the gradient
    # The training.
    steps: int = 2000  # optimizer steps of a run
    batch: int = 128  # images per batch, a multiple of the number of devices
    peak_rate: float = 4e-3  # learning rate after the warm-up
    warmup: int = 100  # steps of linear warm-up; a cosine decay follows
    ema_rate: float = 0.01  # share of the newest parameters in their average
    # The model.
    width: int = 128  # width of the residual stream
    # Drawing.
    samples: int = 12  # digits that every run draws
    sampling_steps: int = 50  # steps from noise to a digit
    # Output.
    every: int = 100  # steps between two validations, and two transfers
    out: str = "runs/diffusion"  # folder for picture, table, logs and reports


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


# --- optimizers -----------------------------------------------------------------------


def adamw(config: Config, clip: optax.GradientTransformation) -> Any:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_rate, config.warmup, config.steps
    )
    return optax.chain(clip, optax.adamw(rate))


# One line per run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, but the norm is still measured.
    "none": lambda c: adamw(c, optaxclip.clip_by_global_norm(jnp.inf)),
    "global": lambda c: adamw(c, optaxclip.clip_by_global_norm(c.max_norm)),
    # No threshold to tune.
    "percentile": lambda c: adamw(c, optaxclip.clip_by_percentile()),
    # Like percentile, but a step that is not finite changes nothing.
    "skip": lambda c: optaxclip.skip_nonfinite(
        adamw(c, optaxclip.clip_by_percentile())
    ),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with its threshold if somebody had to choose one."""
    return f"global {config.max_norm:g}" if name == "global" else name


# --- data -----------------------------------------------------------------------------


SIDE = 8  # pixels along an edge of an image


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 by 8 pixels in [-1, 1]; every tenth is kept for validation."""
    pixels_NP, _ = datasets.load_digits(return_X_y=True)  # from 0 to 16
    images_NP = np.asarray(pixels_NP, np.float32) / 8 - 1
    held_out_N = np.arange(len(images_NP)) % 10 == 0
    return images_NP[~held_out_N], images_NP[held_out_N]


def training_batches(
    config: Config, images_NP: np.ndarray, seed: int
) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(config.steps):
        yield images_NP[rng.integers(len(images_NP), size=config.batch)]


def broken(
    batches: Iterable[np.ndarray], bad_step: int, factor: float
) -> Iterator[np.ndarray]:
    """The same batches, except for one that somebody forgot to normalize."""
    for step, images_BP in enumerate(batches):
        yield images_BP * np.float32(factor) if step == bad_step else images_BP


# --- model ----------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, width: int, linear: Any, norm: Any):
        self.norm = norm(width)
        self.time = linear(width, width)
        self.up = linear(width, 2 * width)
        self.down = linear(2 * width, width)

    def __call__(self, x_BD: jax.Array, time_BD: jax.Array) -> jax.Array:
        h_BD = self.norm(x_BD) + self.time(time_BD)
        return x_BD + self.down(nnx.silu(self.up(h_BD)))


class Denoiser(nnx.Module):
    """Predicts the noise in noisy images; a residual network on all pixels at once."""

    def __init__(
        self,
        *,
        width: int,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, **kinds)
        norm = functools.partial(nnx.RMSNorm, **kinds)
        self.time = linear(32, width)
        self.pixels = linear(SIDE**2, width)
        self.blocks = nnx.List([Block(width, linear, norm) for _ in range(3)])
        self.norm = norm(width)
        self.velocity = linear(width, SIDE**2)

    def __call__(self, noisy_BP: jax.Array, time_B: jax.Array) -> jax.Array:
        # Waves from half a period to a hundred periods over the time from 0 to 1.
        waves_BF = time_B[:, None] * jnp.geomspace(math.pi, 200 * math.pi, 16)
        waves_BF = jnp.concatenate([jnp.sin(waves_BF), jnp.cos(waves_BF)], axis=-1)
        time_BD = nnx.silu(self.time(waves_BF))
        x_BD = self.pixels(noisy_BP)
        for block in self.blocks:
            x_BD = block(x_BD, time_BD)
        velocity_BP = self.velocity(self.norm(x_BD)).astype(jnp.float32)
        # Near time 1 there is almost only noise: the network just learns the rest.
        signal_B1, sigma_B1 = shares(time_B)
        return sigma_B1 * noisy_BP + signal_B1 * velocity_BP


def shares(time_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of image and noise: only the image at time 0, only noise at time 1."""
    angle_B1 = math.pi / 2 * time_B[:, None]
    return jnp.cos(angle_B1), jnp.sin(angle_B1)


def add_noise(images_BP: Any, noise_BP: Any, time_B: jax.Array) -> jax.Array:
    signal_B1, sigma_B1 = shares(time_B)
    return signal_B1 * images_BP + sigma_B1 * noise_BP


def denoising_loss(model: Denoiser, images_BP: Any, key: jax.Array) -> jax.Array:
    """The mean squared error, in float32, of the noise at random times."""
    time_key, noise_key = jax.random.split(key)
    time_B = jax.random.uniform(time_key, images_BP.shape[:1])
    noise_BP = jax.random.normal(noise_key, images_BP.shape)
    predicted_BP = model(add_noise(images_BP, noise_BP, time_B), time_B)
    return jnp.mean((predicted_BP - noise_BP) ** 2)


# --- training -------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("graph", "tx", "ema_rate"), donate_argnames="state"
)
def train_step(
    graph: Any, tx: Any, ema_rate: float, state: Any, images_BP: Any, key: jax.Array
) -> Any:
    params, averaged, opt_state = state

    def loss_of(params: Any) -> jax.Array:
        return denoising_loss(nnx.merge(graph, params), images_BP, key)

    # Gradients have the dtype of what they are taken of.
    half = optax.tree.cast(params, jnp.bfloat16)
    loss, grads = jax.value_and_grad(loss_of)(half)
    updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
    params = optax.apply_updates(params, updates)
    averaged = optax.incremental_update(params, averaged, ema_rate)
    return params, averaged, opt_state


@functools.partial(jax.jit, static_argnames="graph")
def validation_loss(graph: Any, params: Any, images_NP: jax.Array) -> jax.Array:
    # The same times and noise at every validation of every run.
    keys = jax.random.split(jax.random.key(0), 8)
    model = nnx.merge(graph, params)
    return jax.vmap(lambda key: denoising_loss(model, images_NP, key))(keys).mean()


def train(
    config: Config, name: str, tx: Any, seed: int, path: Path
) -> tuple[Any, list[float]]:
    """The drawing model, and its loss every so many steps; the log goes to the path."""
    images_NP, valid_NP = load_digits()
    # Every device has the model, and the devices share each batch.
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), auto)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_image = NamedSharding(mesh, PartitionSpec("batch"))
    graph, params = nnx.split(Denoiser(width=config.width, rngs=nnx.Rngs(seed)))
    state = params, jax.tree.map(jnp.copy, params), tx.init(params)
    state = jax.device_put(state, everywhere)
    valid_NP = jax.device_put(valid_NP, everywhere)

    path.unlink(missing_ok=True)  # an existing log would be continued
    settings = dataclasses.asdict(config) | {"seed": seed}
    log = ClipLog(path, params=params, transform=name, hyperparameters=settings)
    batches = training_batches(config, images_NP, seed)
    batches = broken(batches, config.bad_step, config.bad_factor)
    key, losses = jax.random.key(seed), []
    bar = tqdm(batches, f"{name}, seed {seed}", config.steps, unit="step")
    for step, images_BP in enumerate(bar):
        images_BP = jax.device_put(images_BP, by_image)
        step_key = jax.random.fold_in(key, step)
        state = train_step(graph, tx, config.ema_rate, state, images_BP, step_key)
        if (step + 1) % config.every == 0:
            _, averaged, opt_state = state
            losses.append(float(validation_loss(graph, averaged, valid_NP)))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            log.update(opt_state)
    log.update(state[2])
    return nnx.merge(graph, state[1]), losses


@nnx.jit(static_argnums=1)
def draw(model: Denoiser, config: Config, key: jax.Array) -> jax.Array:
    """Digits out of noise (DDIM, deterministic except for the initial noise)."""

    def step(noisy_BP: jax.Array, times: Any) -> tuple[jax.Array, None]:
        time_B, next_time_B = jnp.tile(times, (config.samples, 1)).T
        signal_B1, sigma_B1 = shares(time_B)
        noise_BP = model(noisy_BP, time_B)
        image_BP = jnp.clip((noisy_BP - sigma_B1 * noise_BP) / signal_B1, -1, 1)
        noise_BP = (noisy_BP - signal_B1 * image_BP) / sigma_B1
        return add_noise(image_BP, noise_BP, next_time_B), None

    # Not from 1: there is only noise, which says nothing about a digit.
    times = jnp.linspace(0.99, 0.0, config.sampling_steps + 1)
    noise_BP = jax.random.normal(key, (config.samples, SIDE**2))
    return jax.lax.scan(step, noise_BP, jnp.stack([times[:-1], times[1:]], 1))[0]


# --- results --------------------------------------------------------------------------


@dataclasses.dataclass
class Runs:
    """All seeds of an optimizer."""

    losses_SV: np.ndarray
    logs: list[LogData]
    digits_BP: np.ndarray  # of the first seed


HEADER = (
    "clip       loss before bad     just after          final"
    "  clipped  skipped  largest norm"
)


def table(config: Config, runs: dict[str, Runs]) -> str:
    """One line per optimizer: validation losses, mean ± deviation over the seeds."""
    bad = config.bad_step if 0 <= config.bad_step < config.steps else config.steps
    after = min(bad // config.every, config.steps // config.every - 1)
    lines = [HEADER]
    for name, run in runs.items():
        before, just_after, final = (
            spread(run.losses_SV[:, i]) for i in (max(after - 1, 0), after, -1)
        )
        clipped = np.mean([log.clipped.mean() for log in run.logs])
        skipped = np.mean([log.skipped.sum() for log in run.logs])
        norm = max(log.norm[np.isfinite(log.norm)].max() for log in run.logs)
        lines.append(
            f"{name:<11}{before:>15}{just_after:>15}{final:>15}"
            f"{clipped:>9.1%}{skipped:>9.1f}{norm:>14.4g}"
        )
    return "\n".join(lines)


def spread(losses_S: np.ndarray) -> str:
    deviation = f" ± {np.std(losses_S, ddof=1):.3f}" if len(losses_S) > 1 else ""
    return f"{losses_S.mean():.3f}{deviation}"


def save(config: Config, runs: dict[str, Runs], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "seed", "step", "loss"])
        for name, run in runs.items():
            for (seed, i), loss in np.ndenumerate(run.losses_SV):
                writer.writerow([name, seed, (i + 1) * config.every, loss])


# Color-blind readers can tell them apart.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def picture(config: Config, runs: dict[str, Runs], path: Path) -> None:
    figure = Figure(figsize=(11, 6 + len(runs)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[5, 1 + len(runs)])
    top, bottom = halves
    left, right = top.subplots(1, 2)
    for color, (name, run) in zip(COLORS, runs.items(), strict=False):
        steps_V = config.every * (1 + np.arange(run.losses_SV.shape[1]))
        ended = np.isnan(run.losses_SV[:, -1]).any()
        label = f"{name}: ends where it is NaN" if ended else name
        left.plot(steps_V, run.losses_SV.mean(0), color=color, label=label)
        low_V, high_V = run.losses_SV.min(0), run.losses_SV.max(0)
        left.fill_between(steps_V, low_V, high_V, color=color, alpha=0.2)
        log = run.logs[0]
        right.plot(log.step, log.norm * log.scale, color=color, lw=1, label=name)
    for axes in (left, right) if 0 <= config.bad_step < config.steps else ():
        axes.axvline(config.bad_step, color="0.85", lw=5, zorder=0, label="bad batch")
    left.set(title="Validation loss of the averaged parameters", xlabel="step")
    left.set(yscale="log", ylabel="squared error of the noise, per pixel")
    right.set(title="Norm of the gradient after the clip, first seed", xlabel="step")
    right.set(yscale="log")
    left.legend(title="mean and range of the seeds")
    right.legend()

    rows = {"real": load_digits()[1][: config.samples]}
    rows |= {name: run.digits_BP for name, run in runs.items()}
    bottom.suptitle("Digits of the validation set, and digits that each run draws")
    grid = bottom.subplots(len(rows), config.samples, squeeze=False)
    for axes_B, (name, digits_BP) in zip(grid, rows.items(), strict=True):
        axes_B[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, digit_P in zip(axes_B, digits_BP, strict=False):
            axes.imshow(digit_P.reshape(SIDE, SIDE), cmap="gray_r", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
            if np.isnan(digit_P).any():
                axes.text(SIDE / 2, SIDE / 2, "NaN", ha="center", va="center")
    figure.savefig(path, dpi=120)


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    if config.steps <= max(config.warmup, config.every - 1):
        raise SystemExit("--steps must be above --warmup, and at least --every")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Runs] = {}
    for name in config.clip.split(","):
        # One for all seeds, so that they compile once.
        tx = optaxclip.record_history(
            CLIPS[name](config), config.every, leaf_norms=True
        )
        models, losses, logs = [], [], []
        for seed in range(config.seeds):
            path = folder / f"{name}-seed{seed}.jsonl"
            model, losses_V = train(config, name, tx, seed, path)
            models.append(model)
            losses.append(losses_V)
            logs.append(read(path))
            report(logs[-1], path.with_suffix(".html"), title=f"diffusion, {name}")
        digits_BP = np.asarray(draw(models[0], config, jax.random.key(0)))
        runs[label(config, name)] = Runs(np.array(losses), logs, digits_BP)
    save(config, runs, folder / "validation.csv")
    picture(config, runs, folder / "diffusion.png")
    print(table(config, runs))
    print(f"In {folder}/ are diffusion.png and, of each run, log and report.")


if __name__ == "__main__":
    main()
