"""The clips of the study, each a function from an optimizer to one that clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

import optaxclip
from optaxclip import contrib
from study.task import Optimizer

Wrap = Callable[[Optimizer], Optimizer]

# Thresholds of the constants, in median norms of the run without a clip.
FACTORS = tuple(30.0 ** (k / 4) for k in range(-4, 5))

DEFAULT = "clip_by_percentile()"
PER_PARAMETER = "clip_by_percentile(50, factor=1, norm=leaf_norm)"


def constant(optimizer: Optimizer, threshold: Any) -> Optimizer:
    """A fixed threshold; an infinite one is no clip at all."""
    return optax.chain(optaxclip.clip_by_global_norm(threshold), optimizer)


def _before(clip: Optimizer) -> Wrap:
    return lambda optimizer: optax.chain(clip, optimizer)


def _percentile(*args: Any, **kwargs: Any) -> Wrap:
    return _before(optaxclip.clip_by_percentile(*args, **kwargs))


# What the library offers, with its defaults or, where there are none, the customary
# setting.
NAMED: dict[str, Wrap] = {
    DEFAULT: _percentile(),
    PER_PARAMETER: _percentile(50, factor=1, norm=optaxclip.leaf_norm),
    "clip_by_global_norm(1.0)": _before(optaxclip.clip_by_global_norm(1.0)),
    "autoclip()": _before(optaxclip.autoclip()),
    "zclip()": _before(optaxclip.zclip()),
    "adagc()": _before(optaxclip.adagc()),
    "adaptive_grad_clip(0.01)": _before(optaxclip.adaptive_grad_clip(0.01)),
    "skip_spikes()": optaxclip.skip_spikes,
}

# Rules from the literature and normalization, run after the default was chosen: with
# their defaults or, where there are none, a constant of 1 or the median.
LITERATURE: dict[str, Wrap] = {
    "adagn()": _before(contrib.adagn()),
    "limit_growth()": _before(contrib.limit_growth()),
    "smooth_clip(1.0)": _before(contrib.smooth_clip(1.0)),
    "clip_coordinate_spikes()": _before(contrib.clip_coordinate_spikes()),
    "clippy()": lambda optimizer: optax.chain(optimizer, contrib.clippy()),
    "with_error_feedback(clip_by_percentile())": _before(
        contrib.with_error_feedback(optaxclip.clip_by_percentile())
    ),
    "clip_by(global_norm, sketched_quantile(0.5))": _before(
        optaxclip.clip_by(optaxclip.global_norm, contrib.sketched_quantile(0.5))
    ),
    "clip_by(global_norm, 1.0, apply=normalize)": _before(
        optaxclip.clip_by(optaxclip.global_norm, 1.0, apply=optaxclip.normalize)
    ),
    "clip_by(leaf_norm, 1.0, apply=normalize)": _before(
        optaxclip.clip_by(optaxclip.leaf_norm, 1.0, apply=optaxclip.normalize)
    ),
    "smooth_clip(quantile(0.5, 1000, ramp=100))": _before(
        contrib.smooth_clip(optaxclip.quantile(0.5, 1000, ramp=100))
    ),
    "clip_by_percentile(norm=subtree_norm)": _percentile(norm=optaxclip.subtree_norm),
}

# What the default was chosen from: multiples of a percentile of the last norms. On
# tasks that are held out there is nothing to choose.
VARIANTS: dict[str, Wrap] = {
    "1 x P10 of 1000, ramp 100": _percentile(10, 1000, factor=1.0),
    "2 x P10 of 1000, ramp 100": _percentile(10, 1000, factor=2.0),
    "3 x P10 of 1000, ramp 100": _percentile(10, 1000, factor=3.0),
    "2 x P5 of 1000, ramp 100": _percentile(5, 1000, factor=2.0),
    "2 x P25 of 1000, ramp 100": _percentile(25, 1000, factor=2.0),
    "2 x P50 of 1000, ramp 100": _percentile(50, 1000, factor=2.0),
    "2 x P10 of 100, ramp 100": _percentile(10, 100, factor=2.0),
    "2 x P10 of 300, ramp 100": _percentile(10, 300, factor=2.0),
    "3 x P10 of 300, ramp 100": _percentile(10, 300, factor=3.0),
    "2 x P10 of 1000, no ramp": _percentile(10, 1000, factor=2.0, ramp=0),
    "2 x P10 of 1000, ramp 30": _percentile(10, 1000, factor=2.0, ramp=30),
    "2 x P10 of 1000, ramp 300": _percentile(10, 1000, factor=2.0, ramp=300),
    "1.5 x P10 of 1000, ramp 300": _percentile(10, 1000, factor=1.5, ramp=300),
    "2 x P10 of 1000, ramp 100, past norms only": _percentile(
        10, 1000, factor=2.0, include_current=False
    ),
    "2 x P10 of 300, ramp 100, each parameter": _percentile(
        10, 300, factor=2.0, norm=optaxclip.leaf_norm
    ),
    "1.5 x P10 of 1000, ramp 100, each parameter": _percentile(
        10, 1000, factor=1.5, norm=optaxclip.leaf_norm
    ),
    "2 x P10 of 1000, ramp 100, spikes skipped": lambda optimizer: (
        optaxclip.skip_spikes(_percentile(10, 1000, factor=2.0)(optimizer))
    ),
    "1 x P50 of 100, ramp 100": _percentile(50, 100, factor=1.0),
    "1 x P50 of 1000, ramp 100": _percentile(50, 1000, factor=1.0),
    "2 x P50 of 100, no ramp": _percentile(50, 100, factor=2.0, ramp=0),
    "1 x P95 of 1000, no ramp, past norms only": _percentile(
        95, 1000, factor=1.0, ramp=0, include_current=False
    ),
}


def clips() -> dict[str, Wrap]:
    """All but the constants, by name."""
    return NAMED | LITERATURE | VARIANTS


def run_on(held_out: bool) -> list[str]:
    """The names of the clips that are run on a task."""
    return list(NAMED | LITERATURE if held_out else clips())
