"""Replay: what another rule would have done with the norms of a run."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._kernel import clip_scale, decide
from optaxclip._thresholds import Rule, Threshold
from optaxclip.audit._log import LogData, read
from optaxclip.audit._what_if.rule_of import rule_of

Norms = np.ndarray | LogData | str | os.PathLike[str]  # or what NumPy makes an array of


class Replay(NamedTuple):
    """What a rule did with a series of norms: float32, of the shape of the norms."""

    thresholds: np.ndarray  #: not negative; infinite where nothing bounds
    scales: np.ndarray  #: min(1, threshold / norm); NaN for a norm of NaN


def replay(rule: Threshold | Rule, norms: Norms) -> Replay:
    r"""Thresholds and scales that a rule gives for recorded norms.

    .. math:: T_t = \mathrm{rule}(n_t, \text{memory of } n_0 \dots n_{t-1}), \quad
              s_t = \min(1, T_t / n_t)

    A rule sees norms and nothing else, so that it can be run without a model: with the
    decision of :func:`optaxclip.clip_by` itself, in one compiled scan on the CPU. The
    results are those of that clip, but for the last bit or two, which another program
    may round otherwise.

    What the run would have done is another matter, since other clips make other
    parameters, and those make other norms: a replay tells most of spikes, and of how a
    rule adapts.

    Args:
      rule: A number, an array, a schedule or a rule, as :func:`optaxclip.clip_by` takes
        it; or a clip of the global norm, such as ``optaxclip.clip_by_percentile()``,
        which stands for its rule. It starts with the memory that ``init`` gives it.
      norms: A log, as a path or as :func:`read` returns it; or an array of shape
        (steps,), or (steps, leaves), in which every leaf has a memory of its own. Taken
        as float32, the precision of clips of float32 and smaller leaves;
        NaN and infinity are what a bad step recorded. Skipped steps count as any other.

    Returns:
      A :class:`Replay`.

      ==========================  ==================================================
      norm                        result
      ==========================  ==================================================
      0                           scale 1
      NaN                         shown to the rule as 0, then forgotten; scale NaN
      infinite                    the same; scale 0, or 1 where nothing bounds
      none at all                 empty arrays
      ==========================  ==================================================

    Raises:
      ValueError: ``norms`` has no or more than two axes, or a negative element; or the
        rule needs the norms of the parameters, which a log does not hold; or ``rule``
        is a skip, an optimizer, or a clip of several norms.

    Example:
      >>> import optaxclip
      >>> from optaxclip.audit import replay
      >>> norms = [1.0, 2.0, 100.0, float("nan"), 1.0]
      >>> thresholds, scales = replay(optaxclip.quantile(0.5, window=10), norms)
      >>> print(thresholds)
      [inf 1.  1.5 2.  2. ]
      >>> print(scales)
      [1.    0.5   0.015   nan 1.   ]
    """
    series = checked("replay", norms)
    if series.ndim > 2:
        raise ValueError(
            "`replay(norms=...)` must have the shape (steps,) or (steps, leaves), got "
            f"{series.shape}."
        )
    if not len(series):
        return Replay(series, series)
    with jax.default_device(_cpu()):
        results = _scan(rule_of("replay", rule), jnp.asarray(series))
        return Replay(*map(np.asarray, results))


def checked(call: str, norms: Norms) -> np.ndarray:
    """A series of norms in float32; what is larger than float32 becomes infinite."""
    if isinstance(norms, LogData | str | os.PathLike):
        norms = read(norms).norm
    with np.errstate(over="ignore"):
        series = np.asarray(norms, np.float32)
    if not series.ndim:
        raise ValueError(f"`{call}(norms=...)` must be a series, got {norms!r}.")
    if np.any(series < 0):
        raise ValueError(
            f"`{call}(norms=...)` must be non-negative, got {series[series < 0][0]}."
        )
    return series


def _cpu() -> Any:
    """The CPU: there a step is a turn of a loop, elsewhere several kernels to launch.

    None, the default device, if JAX was told to do without.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@functools.partial(jax.jit, static_argnums=0)
def _scan(
    rule: optax.GradientTransformationExtraArgs, norms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def step(state, norm):
        decision = decide(_measured, norm, None, norm, rule, state, {})
        threshold = decision.place(decision.thresholds)
        return decision.rule_state, (threshold, clip_scale(norm, threshold))

    _, results = jax.lax.scan(step, rule.init(jnp.zeros_like(norms[0])), norms)
    return results


def _measured(norm: jax.Array) -> jax.Array:
    return norm
