"""Gradient clipping for JAX and Optax, with thresholds that choose themselves.

Every transformation is an ``optax.GradientTransformation``: put it in ``optax.chain``.

Clips with a fixed threshold
  clip_by_global_norm, clip_by_value, clip_by_leaf_norm, clip_by_subtree_norm,
  clip_by_block_rms, adaptive_grad_clip

Clips that choose their own threshold
  clip_by_percentile, autoclip, zclip, adagc

Inside a model
  clip_cotangent: clip the gradient that flows back through one value

Around an optimizer
  skip_nonfinite, skip_spikes: skip bad steps as a whole
  dynamic_loss_scale, loss_scale: float16
  record_history: keep the last steps on the device
  guarded_step: a skip for a loop that owns its parameters

Reading and moving states
  metrics: what the clips did, as scalars for any logger
  migrate_state: use a checkpoint with another clip
  audit: log, replay, report (a subpackage)

From the literature
  contrib: clips that are not among the best of the study (a subpackage)

Build your own
  clip_by, skip_by
  norms: global_norm, leaf_norm, subtree_norm, unit_norm, leaf_rms; unit_axes has
  layouts
  rules for the threshold: constant, relative, quantile, tracked_quantile, zscore,
  window_zscore, ema, lowest, by_name; rules has their parts
  rescale, clamp, normalize, Scaling: how a threshold is applied

States and types
  ClipState, ClipMetrics, SkipState, SkipMetrics, LossScaleState, HistoryState, History,
  NamedNorms, GuardedStep, AxisName, Norm, Norms, Rule, Threshold
"""

import importlib
from typing import TYPE_CHECKING, Any

from optaxclip import rules as rules
from optaxclip import unit_axes as unit_axes
from optaxclip._kernel import ClipMetrics as ClipMetrics
from optaxclip._kernel import ClipState as ClipState
from optaxclip._kernel import GuardedStep as GuardedStep
from optaxclip._kernel import NamedNorms as NamedNorms
from optaxclip._kernel import Norm as Norm
from optaxclip._kernel import Norms as Norms
from optaxclip._kernel import Scaling as Scaling
from optaxclip._kernel import SkipMetrics as SkipMetrics
from optaxclip._kernel import SkipState as SkipState
from optaxclip._kernel import clamp as clamp
from optaxclip._kernel import clip_by as clip_by
from optaxclip._kernel import guarded_step as guarded_step
from optaxclip._kernel import normalize as normalize
from optaxclip._kernel import rescale as rescale
from optaxclip._kernel import skip_by as skip_by
from optaxclip._norms import AxisName as AxisName
from optaxclip._norms import global_norm as global_norm
from optaxclip._norms import leaf_norm as leaf_norm
from optaxclip._norms import leaf_rms as leaf_rms
from optaxclip._norms import subtree_norm as subtree_norm
from optaxclip._norms import unit_norm as unit_norm
from optaxclip._state import History as History
from optaxclip._state import HistoryState as HistoryState
from optaxclip._state import metrics as metrics
from optaxclip._state import migrate_state as migrate_state
from optaxclip._state import record_history as record_history
from optaxclip._thresholds import Rule as Rule
from optaxclip._thresholds import Threshold as Threshold
from optaxclip._thresholds import by_name as by_name
from optaxclip._thresholds import constant as constant
from optaxclip._thresholds import ema as ema
from optaxclip._thresholds import lowest as lowest
from optaxclip._thresholds import quantile as quantile
from optaxclip._thresholds import relative as relative
from optaxclip._thresholds import tracked_quantile as tracked_quantile
from optaxclip._thresholds import window_zscore as window_zscore
from optaxclip._thresholds import zscore as zscore
from optaxclip._transforms import LossScaleState as LossScaleState
from optaxclip._transforms import adagc as adagc
from optaxclip._transforms import adaptive_grad_clip as adaptive_grad_clip
from optaxclip._transforms import autoclip as autoclip
from optaxclip._transforms import clip_by_block_rms as clip_by_block_rms
from optaxclip._transforms import clip_by_global_norm as clip_by_global_norm
from optaxclip._transforms import clip_by_leaf_norm as clip_by_leaf_norm
from optaxclip._transforms import clip_by_percentile as clip_by_percentile
from optaxclip._transforms import clip_by_subtree_norm as clip_by_subtree_norm
from optaxclip._transforms import clip_by_value as clip_by_value
from optaxclip._transforms import clip_cotangent as clip_cotangent
from optaxclip._transforms import dynamic_loss_scale as dynamic_loss_scale
from optaxclip._transforms import loss_scale as loss_scale
from optaxclip._transforms import skip_nonfinite as skip_nonfinite
from optaxclip._transforms import skip_spikes as skip_spikes
from optaxclip._transforms import zclip as zclip

if TYPE_CHECKING:
    from optaxclip import audit as audit
    from optaxclip import contrib as contrib

__all__ = [
    "AxisName",
    "ClipMetrics",
    "ClipState",
    "GuardedStep",
    "History",
    "HistoryState",
    "LossScaleState",
    "NamedNorms",
    "Norm",
    "Norms",
    "Rule",
    "Scaling",
    "SkipMetrics",
    "SkipState",
    "Threshold",
    "adagc",
    "adaptive_grad_clip",
    "audit",
    "autoclip",
    "by_name",
    "clamp",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_percentile",
    "clip_by_subtree_norm",
    "clip_by_value",
    "clip_cotangent",
    "constant",
    "contrib",
    "dynamic_loss_scale",
    "ema",
    "global_norm",
    "guarded_step",
    "leaf_norm",
    "leaf_rms",
    "loss_scale",
    "lowest",
    "metrics",
    "migrate_state",
    "normalize",
    "quantile",
    "record_history",
    "relative",
    "rescale",
    "rules",
    "skip_by",
    "skip_nonfinite",
    "skip_spikes",
    "subtree_norm",
    "tracked_quantile",
    "unit_axes",
    "unit_norm",
    "window_zscore",
    "zclip",
    "zscore",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports ``audit`` or ``contrib`` when it is first asked for."""
    if name in ("audit", "contrib"):
        return importlib.import_module(f"optaxclip.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
