"""PPO on CartPole: a whole run is one program, and all seeds run in it at once.

    pip install "optaxclip[examples]"
    python ppo.py          # three clips, a table, a picture, reports: minutes on a CPU
    python ppo.py --clip global --max-norm 2 --seeds 64
    python ppo.py --total-steps 1000000 --envs 64 --seeds 256    # on an accelerator

The environment (Gymnasium's functional CartPole), the actor-critic (Flax NNX) and PPO
are pure functions under `scan`; `vmap` runs the seeds. The script compares three runs:
with `clip_by_global_norm(0.5)`, which implementations of PPO customarily use, with
`clip_by_percentile()`, which chooses its own threshold, and without a clip. Every clip
gets the same seeds. On this easy task almost every norm exceeds 0.5, and the run with
that threshold has the lowest return. All three spreads overlap, so another machine may
rank the runs differently:

clip        mean return      of the last tenth   clipped  norm: median  largest
none          276.4 ± 43.2          335.2 ± 114.7      0.0%         32.25     94.0
global 0.5    233.8 ± 28.2           278.8 ± 46.1     98.3%         32.97     79.9
percentile    264.4 ± 24.9           369.3 ± 92.9     71.1%         32.48     76.6

The suffix of a name lists the axes of its array: T time, E environments, B batch, O
observation, A actions, U iterations, K epochs, M minibatches, G gradients (all of a
run), S seeds.
"""

import argparse
import csv
import dataclasses
import inspect
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gymnasium.envs.phys2d.cartpole import CartPoleFunctional, CartPoleParams
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, LogData, read, report


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile"  # runs to make, from CLIPS
    seeds: int = 16  # seeds that run side by side
    rate: float = 2.5e-4  # learning rate at the start; it falls linearly to 0
    max_norm: float = 0.5  # global: largest norm of the gradient
    # PPO; the defaults are PureJaxRL's, with fewer steps.
    total_steps: int = 100_000  # steps of the environments, all together
    envs: int = 4  # environments that run side by side
    rollout: int = 128  # steps of each environment in an iteration
    epochs: int = 4  # passes over a rollout
    minibatches: int = 4  # minibatches of a pass, a divisor of envs * rollout
    gamma: float = 0.99  # discount of the return
    lam: float = 0.95  # lambda of the generalized advantage estimate
    clip_ratio: float = 0.2  # how far a ratio of probabilities may leave 1
    value_weight: float = 0.5  # weight of the loss of the value
    entropy_weight: float = 0.01  # weight of the entropy
    width: int = 64  # width of the two hidden layers
    # The output.
    out: str = "runs/ppo"  # folder for picture, returns, logs and reports

    @property
    def iterations(self) -> int:
        return self.total_steps // (self.envs * self.rollout)

    @property
    def updates(self) -> int:
        return self.iterations * self.epochs * self.minibatches


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


# --- clips ----------------------------------------------------------------------------


def adam(config: Config, clip: optax.GradientTransformation) -> Any:
    """Adam behind a clip; a step that is not finite changes nothing."""
    rate = optax.linear_schedule(config.rate, 0.0, config.updates)
    return optaxclip.skip_nonfinite(optax.chain(clip, optax.adam(rate, eps=1e-5)))


# One line per run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, but the norm is still measured.
    "none": lambda c: adam(c, optaxclip.clip_by_global_norm(jnp.inf)),
    "global": lambda c: adam(c, optaxclip.clip_by_global_norm(c.max_norm)),
    "percentile": lambda c: adam(c, optaxclip.clip_by_percentile()),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with its threshold if somebody had to choose one."""
    return f"global {config.max_norm:g}" if name == "global" else name


# --- environment ----------------------------------------------------------------------

ENV = CartPoleFunctional()
# Gymnasium's own default adds these two factors instead of multiplying them.
PHYSICS = CartPoleParams(polemass_length=0.1 * 0.5)
MAX_EPISODE = 500
OBSERVATIONS, ACTIONS = 4, 2  # how many there are


class EnvState(NamedTuple):
    """An environment, and what its running episode has seen so far."""

    state: jax.Array
    length: jax.Array
    episode_return: jax.Array


def reset(key: jax.Array) -> EnvState:
    return EnvState(ENV.initial(key, PHYSICS), jnp.int32(0), jnp.float32(0))


def env_step(
    env: EnvState, action: jax.Array, key: jax.Array
) -> tuple[EnvState, jax.Array, jax.Array, jax.Array]:
    """The next state, the reward, whether the episode is over, and its return."""
    # As a float, since some programs forbid JAX to mix dtypes.
    state = ENV.transition(env.state, jnp.float32(action), None, PHYSICS)
    reward = jnp.float32(ENV.reward(env.state, action, state, None, PHYSICS))
    after = EnvState(state, env.length + 1, env.episode_return + reward)
    done = ENV.terminal(state, None, PHYSICS) | (after.length >= MAX_EPISODE)
    following = jax.tree.map(lambda x, y: jnp.where(done, x, y), reset(key), after)
    return following, reward, done, after.episode_return


# --- model ----------------------------------------------------------------------------


class ActorCritic(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.actor = mlp(width, ACTIONS, 0.01, rngs)
        self.critic = mlp(width, 1, 1.0, rngs)

    def __call__(self, obs_BO: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.actor(obs_BO), self.critic(obs_BO)[..., 0]


def mlp(width: int, outputs: int, last_gain: float, rngs: nnx.Rngs) -> nnx.Sequential:
    def linear(inputs: int, outputs: int, gain: float) -> nnx.Linear:
        init = nnx.initializers.orthogonal(gain)
        return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

    return nnx.Sequential(
        linear(OBSERVATIONS, width, 2**0.5),
        nnx.tanh,
        linear(width, width, 2**0.5),
        nnx.tanh,
        linear(width, outputs, last_gain),
    )


# --- PPO ------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step of the environments leaves; in a rollout [T, E], then [B]."""

    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array
    episode_return: jax.Array


def log_probs_of(logits_BA: jax.Array, action_B: jax.Array) -> jax.Array:
    log_probs_BA = jax.nn.log_softmax(logits_BA)
    return jnp.take_along_axis(log_probs_BA, action_B[:, None], axis=-1)[:, 0]


def collect(
    config: Config, model: ActorCritic, env_E: EnvState, key: jax.Array
) -> tuple[EnvState, Step]:
    def step(env_E: EnvState, key: jax.Array) -> tuple[EnvState, Step]:
        act_key, env_key = jax.random.split(key)
        obs_EO = jax.vmap(lambda s: ENV.observation(s, None, PHYSICS))(env_E.state)
        logits_EA, value_E = model(obs_EO)
        action_E = jax.random.categorical(act_key, logits_EA)
        key_E = jax.random.split(env_key, config.envs)
        env_E, reward_E, done_E, return_E = jax.vmap(env_step)(env_E, action_E, key_E)
        log_prob_E = log_probs_of(logits_EA, action_E)
        return env_E, Step(
            obs_EO, action_E, log_prob_E, value_E, reward_E, done_E, return_E
        )

    return jax.lax.scan(step, env_E, jax.random.split(key, config.rollout))


def advantages(config: Config, steps_TE: Step, last_value_E: jax.Array) -> jax.Array:
    """The generalized advantage estimate, from the last step to the first."""

    def back(carry: Any, step_E: Step) -> Any:
        advantage_E, next_value_E = carry
        goes_on_E = jnp.where(step_E.done, 0.0, 1.0)
        target_E = step_E.reward + config.gamma * next_value_E * goes_on_E
        advantage_E = (
            target_E
            - step_E.value
            + config.gamma * config.lam * goes_on_E * advantage_E
        )
        return (advantage_E, step_E.value), advantage_E

    start = jnp.zeros_like(last_value_E), last_value_E
    return jax.lax.scan(back, start, steps_TE, reverse=True)[1]


def ppo_loss(
    config: Config, model: ActorCritic, steps_B: Step, advantage_B: jax.Array
) -> jax.Array:
    logits_BA, value_B = model(steps_B.obs)
    low, high = 1 - config.clip_ratio, 1 + config.clip_ratio

    ratio_B = jnp.exp(log_probs_of(logits_BA, steps_B.action) - steps_B.log_prob)
    gain_B = (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)
    actor_B = jnp.minimum(ratio_B * gain_B, jnp.clip(ratio_B, low, high) * gain_B)

    target_B = steps_B.value + advantage_B
    near_B = steps_B.value + jnp.clip(
        value_B - steps_B.value, -config.clip_ratio, config.clip_ratio
    )
    error_B = jnp.maximum((value_B - target_B) ** 2, (near_B - target_B) ** 2)

    log_probs_BA = jax.nn.log_softmax(logits_BA)
    entropy_B = -jnp.sum(jnp.exp(log_probs_BA) * log_probs_BA, axis=-1)
    return (
        -actor_B.mean()
        + config.value_weight * 0.5 * error_B.mean()
        - config.entropy_weight * entropy_B.mean()
    )


def run(
    config: Config, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """The returns, the norms of the gradients, and the optimizer's last state."""
    model_key, env_key, key = jax.random.split(key, 3)
    graph, params = nnx.split(ActorCritic(config.width, nnx.Rngs(model_key)))
    env_E = jax.vmap(reset)(jax.random.split(env_key, config.envs))
    tx = optax.with_extra_args_support(optimizer)

    def update(carry: Any, batch: Any) -> Any:
        params, opt_state = carry

        def loss_of(params: Any) -> jax.Array:
            return ppo_loss(config, nnx.merge(graph, params), *batch)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), optaxclip.global_norm(grads)

    def epoch(carry: Any, key: jax.Array, batch_B: Any) -> Any:
        size = config.envs * config.rollout
        order_B = jax.random.permutation(key, size)
        batch_MB = jax.tree.map(
            lambda x: x[order_B].reshape(config.minibatches, -1, *x.shape[1:]), batch_B
        )
        return jax.lax.scan(update, carry, batch_MB)

    def iteration(carry: Any, key: jax.Array) -> Any:
        params, opt_state, env_E, last_return = carry
        collect_key, epochs_key = jax.random.split(key)
        model = nnx.merge(graph, params)
        env_E, steps_TE = collect(config, model, env_E, collect_key)
        _, last_value_E = model(
            jax.vmap(lambda s: ENV.observation(s, None, PHYSICS))(env_E.state)
        )
        advantage_TE = advantages(config, steps_TE, last_value_E)
        batch_B = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (steps_TE, advantage_TE)
        )
        (params, opt_state), norm_KM = jax.lax.scan(
            lambda carry, key: epoch(carry, key, batch_B),
            (params, opt_state),
            jax.random.split(epochs_key, config.epochs),
        )
        # The mean over the episodes that ended; if none did, the previous mean.
        done_TE = steps_TE.done
        total = jnp.sum(steps_TE.episode_return, where=done_TE)
        count = jnp.sum(done_TE, dtype=jnp.float32)
        last_return = jnp.where(count > 0, total / jnp.maximum(count, 1), last_return)
        return (params, opt_state, env_E, last_return), (last_return, norm_KM)

    carry = params, tx.init(params), env_E, jnp.float32(0)
    keys = jax.random.split(key, config.iterations)
    carry, (return_U, norm_UKM) = jax.lax.scan(iteration, carry, keys)
    return return_U, norm_UKM.reshape(-1), carry[1]


# --- results --------------------------------------------------------------------------


@dataclasses.dataclass
class Runs:
    """All seeds of a clip."""

    return_SU: np.ndarray
    norm_SG: np.ndarray
    clipped_S: np.ndarray  # shares of the updates
    log: LogData  # of the first seed


def train_seeds(config: Config, name: str, folder: Path) -> Runs:
    # The history of a whole run stays on the device until the run ends.
    tx = optaxclip.record_history(CLIPS[name](config), config.updates, leaf_norms=True)
    # As many devices as divide the seeds evenly.
    devices = math.gcd(config.seeds, jax.device_count())
    mesh = Mesh(jax.devices()[:devices], "seed")
    key_S = jax.random.split(jax.random.key(0), config.seeds)
    key_S = jax.device_put(key_S, NamedSharding(mesh, PartitionSpec("seed")))
    program = jax.jit(jax.vmap(lambda key: run(config, tx, key)))
    return_SU, norm_SG, state_S = jax.device_get(program(key_S))

    path = folder / f"{name}-seed0.jsonl"
    path.unlink(missing_ok=True)  # an existing log would be continued
    settings = dataclasses.asdict(config)
    # `vmap` stacked the seeds. The log takes the first one.
    ClipLog(path, transform=name, hyperparameters=settings).update(state_S)
    log = read(path)
    report(log, path.with_suffix(".html"), title=f"ppo, {name}, first seed")
    clipped_S = np.asarray(optaxclip.metrics(state_S)["clip_fraction"])
    return Runs(return_SU, norm_SG, clipped_S, log)


HEADER = (
    "clip        mean return      of the last tenth   clipped  norm: median  largest"
)


def table(runs: dict[str, Runs]) -> str:
    """One line per clip: returns and shares, mean ± deviation over the seeds."""
    lines = [HEADER]
    for name, run in runs.items():
        last = max(1, run.return_SU.shape[1] // 10)
        lines.append(
            f"{name:<11}{spread(run.return_SU.mean(1)):>15}"
            f"{spread(run.return_SU[:, -last:].mean(1)):>23}"
            f"{run.clipped_S.mean():>10.1%}{np.median(run.norm_SG):>14.2f}"
            f"{run.norm_SG.max():>9.1f}"
        )
    return "\n".join(lines)


def spread(value_S: np.ndarray) -> str:
    deviation = f" ± {np.std(value_S, ddof=1):.1f}" if len(value_S) > 1 else ""
    return f"{value_S.mean():.1f}{deviation}"


def save(config: Config, runs: dict[str, Runs], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "seed", "step", "return"])
        for name, run in runs.items():
            for (seed, i), value in np.ndenumerate(run.return_SU):
                step = (i + 1) * config.envs * config.rollout
                writer.writerow([name, seed, step, value])


# Color-blind readers can tell them apart.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def picture(config: Config, runs: dict[str, Runs], path: Path) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(runs), height_ratios=[3, 2])
    top = figure.add_subplot(grid[0, :])
    step_U = config.envs * config.rollout * np.arange(1, config.iterations + 1)
    below = None
    for i, (name, run) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        top.plot(step_U, run.return_SU.mean(0), color=color, label=name)
        low_U, high_U = np.percentile(run.return_SU, [25, 75], axis=0)
        top.fill_between(step_U, low_U, high_U, color=color, alpha=0.2)
        below = figure.add_subplot(grid[1, i], sharey=below)
        below.plot(run.log.step, run.log.norm, ".", ms=2, color=color, alpha=0.5)
        finite = np.isfinite(run.log.threshold)
        threshold = np.where(finite, run.log.threshold, np.nan)
        below.plot(run.log.step, threshold, color="black", label="threshold")
        below.set_title(f"{name}: {run.clipped_S.mean():.0%} of updates clipped")
        below.set(yscale="log", xlabel="update of the first seed")
        if finite.any():
            below.legend()
        if not i:
            below.set_ylabel("norm of the gradient")
    top.set_title(f"Return of CartPole, mean and middle half of {config.seeds} seeds")
    top.set(xlabel="steps of the environments", ylabel="mean return of an episode")
    top.legend(title="clip", loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    # One thread on a CPU: the operations are too small to be worth splitting.
    os.environ.setdefault("NPROC", "1")
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    if config.envs * config.rollout % config.minibatches:
        raise SystemExit("--minibatches must be a divisor of envs * rollout")
    if not config.iterations:
        raise SystemExit("--total-steps must be at least envs * rollout")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(config.clip.split(","), unit="clip")
    runs: dict[str, Runs] = {}
    for name in bar:
        bar.set_description(f"{name}, {config.seeds} seeds")
        runs[label(config, name)] = train_seeds(config, name, folder)
    save(config, runs, folder / "returns.csv")
    picture(config, runs, folder / "ppo.png")
    print(table(runs))
    print(f"In {folder}/ are ppo.png, returns.csv and, of each clip, log and report.")


if __name__ == "__main__":
    main()
