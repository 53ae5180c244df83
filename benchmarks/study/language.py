"""Tasks of language: Transformers, LoRA adapters and an LSTM on characters."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lora
import numpy as np
import optax
import train as example
from flax import nnx

from study.task import Key, Task, fit, optimize, warmup_cosine

VOCABULARY, CONTEXT, BATCH = 128, 32, 16
WORST = float(np.log(VOCABULARY))

OPTIMIZERS = {
    "AdamW": optax.adamw,
    "Lion": optax.lion,
    "Muon": optax.contrib.muon,
}


# --- data -----------------------------------------------------------------------------


@functools.cache
def text(source: Callable[[], Any]) -> tuple[jax.Array, jax.Array]:
    train, validation = source()
    return jnp.asarray(train, jnp.uint8), jnp.asarray(validation, jnp.uint8)


def library() -> tuple[np.ndarray, np.ndarray]:
    """8 MB of the standard library in ASCII; every tenth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Not the library itself, or tables of data.
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings"}
    skip |= {"pydoc_data", "__pycache__"}
    paths = sorted(root.rglob("*.py"))
    paths = [p for p in paths if not skip & set(p.relative_to(root).parts)]
    texts, room = [], 8_000_000
    for path in paths:
        texts.append(np.frombuffer(path.read_bytes()[:room], np.uint8))
        room -= len(texts[-1])
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    validation = np.concatenate(texts[::10])
    return np.minimum(train, 127), np.minimum(validation, 127)


def windows(text: jax.Array, starts_B: jax.Array) -> jax.Array:
    return text[starts_B[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)


def batches(text: jax.Array, share: float = 0.0, size: float = 1.0) -> Any:
    """Random windows; in a share of the batches one sequence counts far too much."""

    def batch(key: Key, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        sample_key, break_key = jax.random.split(key)
        starts_B = jax.random.randint(sample_key, BATCH, 0, len(text) - CONTEXT - 1)
        ones_BT = jnp.ones((BATCH, CONTEXT))
        broken_BT = ones_BT.at[0].set(size * BATCH)
        broken = jax.random.bernoulli(break_key, share)
        return windows(text, starts_B), jnp.where(broken, broken_BT, ones_BT)

    return batch


def loss(model: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    return example.cross_entropy(model, *data)


def mean_loss(text: jax.Array, batches: int = 32) -> Callable[[Any], jax.Array]:
    """The loss over windows that are spread over all of the text."""
    last = len(text) - CONTEXT - 1
    starts = np.linspace(0, last, batches * BATCH, dtype=int).reshape(batches, BATCH)
    tokens_NBT1 = jax.vmap(functools.partial(windows, text))(jnp.asarray(starts))

    def validate(model: Any) -> jax.Array:
        return jax.lax.map(
            lambda tokens_BT1: example.cross_entropy(model, tokens_BT1), tokens_NBT1
        ).mean()

    return validate


# --- tasks ----------------------------------------------------------------------------


def transformer(rngs: nnx.Rngs) -> example.Transformer:
    config = example.Config(width=32, depth=2, heads=2, context=CONTEXT)
    return example.Transformer(config, rngs)


def language_task(
    name: str,
    steps: int,
    optimizer: str = "AdamW",
    rates: tuple[float, float, float] = (2e-3, 6e-3, 1.8e-2),
    *,
    broken: bool = False,
) -> Task:
    train, validation = text(library)
    data = batches(train, 0.01, 1000.0) if broken else batches(train)
    return Task(
        name=name,
        model="Transformer, characters",
        trouble="1 % of the gradients 1,000 times too large" if broken else "none",
        optimizer=optimizer,
        make_optimizer=lambda rate: OPTIMIZERS[optimizer](warmup_cosine(rate, steps)),
        rates=rates,
        unit="nats",
        worst=WORST,
        train=fit(transformer, loss, data, mean_loss(validation), steps),
    )


def lora_task(steps: int) -> Task:
    train, validation = text(lora.other_text)
    base = _pretrained(2 * steps)

    def adapted(rngs: nnx.Rngs) -> Any:
        model = nnx.merge(*base)
        lora.add_lora(model, rank=4, rngs=rngs)
        return model

    return Task(
        name="lora",
        model="LoRA adapters of a Transformer",
        trouble="2 % of the gradients 100 times too large",
        optimizer="AdamW",
        make_optimizer=lambda rate: optax.adamw(warmup_cosine(rate, steps)),
        rates=(1e-2, 3e-2, 1e-1),
        unit="nats",
        worst=WORST,
        train=fit(
            adapted,
            loss,
            batches(train, 0.02, 100.0),
            mean_loss(validation),
            steps,
            wrt=nnx.LoRAParam,
        ),
    )


def _pretrained(steps: int) -> tuple[Any, Any]:
    train, _ = text(library)
    optimizer = optax.adamw(warmup_cosine(6e-3, steps))

    @jax.jit
    def pretrain(key: Key) -> Any:
        model, *_ = optimize(
            transformer(nnx.Rngs(key)), loss, batches(train), steps, optimizer, key
        )
        return nnx.state(model)

    return nnx.graphdef(transformer(nnx.Rngs(0))), pretrain(jax.random.key(0))


class LSTM(nnx.Module):
    """One layer; the same calls as `train.Transformer`."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.characters = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(width, width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_TBD = self.characters(tokens_BT).swapaxes(0, 1)
        zeros_BD = jnp.zeros_like(x_TBD[0])
        _, states_TBD = jax.lax.scan(self.cell, (zeros_BD, zeros_BD), x_TBD)
        return self.head(states_TBD.swapaxes(0, 1))


def lstm_task(steps: int) -> Task:
    train, validation = text(library)
    return Task(
        name="lstm",
        model="LSTM, characters",
        trouble="none",
        optimizer="SGD",
        make_optimizer=lambda rate: optax.sgd(warmup_cosine(rate, steps)),
        rates=(0.3, 1.0, 3.0),
        unit="nats",
        worst=WORST,
        train=fit(
            lambda rngs: LSTM(64, rngs),
            loss,
            batches(train),
            mean_loss(validation),
            steps,
        ),
    )
