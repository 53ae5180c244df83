"""Tasks of recurrence, images and control."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusion
import digits_cnn
import jax
import jax.numpy as jnp
import optax
import ppo
import temporal_order as recurrent

from study.task import Key, Optimizer, Task, fit

VALIDATION = 1000  # fresh sequences


def temporal_order_task(steps: int, length: int = 20, batch: int = 20) -> Task:
    inputs_BTI, labels_B = recurrent.temporal_order(
        jax.random.key(1), VALIDATION, length
    )

    def wrong(model: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(model(inputs_BTI), axis=-1) != labels_B)

    return Task(
        name="temporal-order",
        model="tanh RNN, order of two symbols",
        trouble="explodes through time",
        optimizer="SGD",
        make_optimizer=optax.sgd,
        rates=(0.03, 0.1, 0.3),
        unit="error",
        seeds=16,
        worst=0.75,
        train=fit(
            lambda rngs: recurrent.RNN(
                inputs=recurrent.SYMBOLS,
                units=50,
                outputs=recurrent.CLASSES,
                rngs=rngs,
            ),
            lambda model, data: recurrent.cross_entropy(model, *data),
            lambda key, step: recurrent.temporal_order(key, batch, length),
            wrong,
            steps,
        ),
    )


def addition(key: Key, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Numbers and two marks on them; asked for is the mean of the marked ones."""
    keys = jax.random.split(key, 3)
    numbers_BT = jax.random.uniform(keys[0], (batch, length))
    first_B = jax.random.randint(keys[1], batch, 0, length // 10)
    second_B = jax.random.randint(keys[2], batch, length // 10, length // 2)
    marks_BT = jax.nn.one_hot(first_B, length) + jax.nn.one_hot(second_B, length)
    inputs_BTI = jnp.stack([numbers_BT, marks_BT], axis=-1)
    return inputs_BTI, (numbers_BT * marks_BT).sum(-1) / 2


def addition_task(steps: int, length: int = 10, batch: int = 20) -> Task:
    def loss(model: Any, data: Any) -> jax.Array:
        inputs_BTI, targets_B = data
        return jnp.mean((model(inputs_BTI)[:, 0] - targets_B) ** 2)

    fresh = addition(jax.random.key(1), VALIDATION, length)
    return Task(
        name="addition",
        model="tanh RNN, sum of two numbers",
        trouble="explodes through time",
        optimizer="SGD",
        make_optimizer=optax.sgd,
        rates=(0.1, 0.3, 1.0),
        unit="squared error",
        seeds=16,
        worst=1 / 24,  # the variance of the mean of two uniform numbers
        train=fit(
            lambda rngs: recurrent.RNN(inputs=2, units=50, outputs=1, rngs=rngs),
            loss,
            lambda key, step: addition(key, batch, length),
            lambda model: loss(model, fresh),
            steps,
        ),
    )


def digits_cnn_task(steps: int, batch: int = 32) -> Task:
    *train, images, labels = map(jnp.asarray, digits_cnn.load_digits())

    def sample(key: Key, step: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        chosen_B = jax.random.randint(keys[0], batch, 0, len(train[0]))
        wrong_B = jax.random.bernoulli(keys[1], 0.1, (batch,))
        any_B = jax.random.randint(keys[2], batch, 0, 10)
        labels_B = jnp.where(wrong_B, any_B, train[1][chosen_B])
        size = jnp.where(jax.random.bernoulli(keys[3], 0.01), 300.0, 1.0)
        return train[0][chosen_B], labels_B, size

    def loss(model: Any, data: Any) -> jax.Array:
        images_BHWC, labels_B, size = data
        return size * digits_cnn.cross_entropy(model, images_BHWC, labels_B)

    return Task(
        name="digits-cnn",
        model="CNN without normalization, digits",
        trouble="10 % of the labels wrong, 1 % of the gradients 300 times too large",
        optimizer="SGD, momentum 0.9",
        seeds=8,
        make_optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
        rates=(0.01, 0.03, 0.1),
        unit="nats",
        worst=float(jnp.log(10)),
        train=fit(
            lambda rngs: digits_cnn.CNN(width=8, rngs=rngs),
            loss,
            sample,
            lambda model: digits_cnn.cross_entropy(model, images, labels),
            steps,
        ),
    )


def ppo_task(steps: int) -> Task:
    config = ppo.Config()
    iterations = max(1, steps // (config.epochs * config.minibatches))
    seen = iterations * config.envs * config.rollout
    config = dataclasses.replace(config, total_steps=seen)

    def train(optimizer: Optimizer, key: Key) -> Any:
        return_U, norm_G, state = ppo.run(config, optimizer, key)
        last = max(1, iterations // 10)
        return 500 - return_U[-last:].mean(), norm_G, state

    return Task(
        name="ppo",
        model="PPO, CartPole",
        trouble="norms that rise with the return",
        optimizer="Adam",
        make_optimizer=lambda rate: optax.adam(rate, eps=1e-5),
        rates=(1e-3, 3e-3, 1e-2),
        unit="of 500 missed",
        seeds=24,
        worst=500.0,
        train=train,
    )


def diffusion_task(steps: int, batch: int = 64) -> Task:
    train_NP, validation_NP = map(jnp.asarray, diffusion.load_digits())

    def sample(key: Key, step: jax.Array) -> Any:
        chosen_key, noise_key = jax.random.split(key)
        chosen_B = jax.random.randint(chosen_key, batch, 0, len(train_NP))
        return train_NP[chosen_B], noise_key

    def validate(model: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(1), 4)
        return jnp.mean(
            jnp.stack([diffusion.denoising_loss(model, validation_NP, k) for k in keys])
        )

    return Task(
        name="diffusion",
        model="diffusion in bfloat16, digits",
        trouble="none",
        optimizer="Adam",
        make_optimizer=optax.adam,
        rates=(3e-3, 1e-2, 3e-2),
        unit="squared error",
        worst=1.0,
        train=fit(
            lambda rngs: diffusion.Denoiser(width=64, rngs=rngs),
            lambda model, data: diffusion.denoising_loss(model, *data),
            sample,
            validate,
            steps,
        ),
    )
