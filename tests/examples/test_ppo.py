"""`examples/ppo.py`, run as a person runs it, for seconds; and its parts."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaxclip.audit import read

pytest.importorskip("gymnasium")

SCRIPT = Path(__file__).parents[2] / "examples" / "ppo.py"
TINY = "--total-steps 512 --envs 2 --rollout 64 --seeds 2 --width 16"


@pytest.fixture
def ppo(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import ppo

    return ppo


def run(arguments: str, out: Path, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        # Import the package under test, which need not be installed.
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def returns(folder: Path, clip: str) -> np.ndarray:
    """Seeds by iterations."""
    with open(folder / "returns.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["clip"] == clip]
    seeds = 1 + max(int(row["seed"]) for row in rows)
    return np.array([float(row["return"]) for row in rows]).reshape(seeds, -1)


@pytest.mark.slow
def test_every_clip_meets_the_same_seeds(tmp_path):
    done = run("--max-norm 0.1", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:4]}
    assert list(rows) == ["none", "global", "percentile"]
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    none = read(tmp_path / "none-seed0.jsonl")
    for name, row in rows.items():
        assert f"ppo, {name}" in (tmp_path / f"{name}-seed0.html").read_text()
        log = read(tmp_path / f"{name}-seed0.jsonl")
        # 4 iterations of 4 epochs of 4 minibatches.
        assert log.step.tolist() == list(range(64))
        assert (log.norm[0], log.loss[0]) == (none.norm[0], none.loss[0])
        return_SU = returns(tmp_path, name.replace("global", "global 0.1"))
        assert return_SU.shape == (2, 4)
        assert return_SU[0, 0] == returns(tmp_path, "none")[0, 0]
        mean_S = return_SU.mean(1)
        assert mean_S[0] != mean_S[1]
        assert f"{mean_S.mean():.1f} ± {np.std(mean_S, ddof=1):.1f}" in row
    assert not none.clipped.any()
    held = read(tmp_path / "global-seed0.jsonl")
    assert held.clipped.mean() > 0.9
    assert (held.norm * held.scale <= 0.1 * (1 + 1e-5)).all()


@pytest.mark.slow
def test_seeds_are_shared_out_among_devices(tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    for out, devices in ((one, 1), (eight, 8)):
        done = run("--clip global --total-steps 128", out, devices)
        assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(*(returns(out, "global 0.5") for out in (one, eight)))
    one, eight = (read(out / "global-seed0.jsonl") for out in (one, eight))
    np.testing.assert_allclose(one.norm, eight.norm, rtol=1e-3)


@pytest.mark.slow
def test_it_learns(ppo):
    config, adam = ppo.Config(total_steps=16_384), optax.adam(1e-3, eps=1e-5)
    train = jax.jit(jax.vmap(lambda key: ppo.run(config, adam, key)))
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        return_SU, norm_SG, _ = train(jax.random.split(jax.random.key(0), 3))
    assert (return_SU.shape, norm_SG.shape) == ((3, 32), (3, 512))
    assert (norm_SG > 0).all()
    assert (return_SU[:, 0] < 40).all()  # as good as chance
    assert (return_SU[:, -4:].mean(1) > 100).all()


def test_episodes_end_where_gymnasium_ends_them(ppo):
    import gymnasium

    gym_env = gymnasium.make("CartPole-v1")
    state, _ = gym_env.reset(seed=0)
    env = ppo.reset(jax.random.key(0))._replace(state=jnp.asarray(state))
    for length in range(1, 100):
        action = int(length % 3 > 0)
        state, _, over, *_ = gym_env.step(action)
        env, reward, done, episode_return = ppo.env_step(
            env, jnp.int32(action), jax.random.key(length)
        )
        assert (reward, episode_return, bool(done)) == (1, length, over)
        if over:
            break
        np.testing.assert_allclose(env.state, state, rtol=1e-4, atol=1e-6)
    assert over
    assert (env.length, env.episode_return) == (0, 0)


def test_an_episode_ends_at_its_500th_step(ppo):
    env = ppo.reset(jax.random.key(0))._replace(length=jnp.int32(498))
    env, _, done, _ = ppo.env_step(env, jnp.int32(0), jax.random.key(1))
    assert not done
    env, _, done, _ = ppo.env_step(env, jnp.int32(1), jax.random.key(2))
    assert done
    assert env.length == 0


def test_advantages_are_those_of_the_definition(ppo):
    rng = np.random.default_rng(0)
    config = ppo.Config(gamma=0.9, lam=0.8)
    reward, value = rng.normal(size=(2, 6))
    last, done = 0.7, np.array([0, 0, 1, 0, 0, 0])
    steps = ppo.Step(*[None] * 7)._replace(
        reward=jnp.array(reward)[:, None],
        value=jnp.array(value)[:, None],
        done=jnp.array(done, bool)[:, None],
    )
    got = ppo.advantages(config, steps, jnp.array([last]))

    error = reward + 0.9 * (1 - done) * np.append(value[1:], last) - value
    for t in range(6):
        # A sum over the steps to come, until the episode ends.
        expected, weight = 0.0, 1.0
        for later in range(t, 6):
            expected += weight * error[later]
            weight *= 0.9 * 0.8 * (1 - done[later])
        np.testing.assert_allclose(got[t, 0], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--minibatches 3", "--minibatches must be a divisor of envs * rollout"),
        ("--total-steps 100", "--total-steps must be at least envs * rollout"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
