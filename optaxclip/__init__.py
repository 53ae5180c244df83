"""Gradient clipping for JAX that is right everywhere and tells you what it did."""

from optaxclip import rules as rules
from optaxclip import unit_axes as unit_axes
from optaxclip._kernel import ClipMetrics as ClipMetrics
from optaxclip._kernel import ClipState as ClipState
from optaxclip._kernel import GuardedStep as GuardedStep
from optaxclip._kernel import SkipMetrics as SkipMetrics
from optaxclip._kernel import SkipState as SkipState
from optaxclip._kernel import clamp as clamp
from optaxclip._kernel import clip_by as clip_by
from optaxclip._kernel import guarded_step as guarded_step
from optaxclip._kernel import rescale as rescale
from optaxclip._kernel import skip_by as skip_by
from optaxclip._norms import global_norm as global_norm
from optaxclip._norms import leaf_norm as leaf_norm
from optaxclip._norms import leaf_rms as leaf_rms
from optaxclip._norms import unit_norm as unit_norm
from optaxclip._state import History as History
from optaxclip._state import HistoryState as HistoryState
from optaxclip._state import metrics as metrics
from optaxclip._state import migrate_state as migrate_state
from optaxclip._state import record_history as record_history
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
from optaxclip._transforms import clip_by_value as clip_by_value
from optaxclip._transforms import dynamic_loss_scale as dynamic_loss_scale
from optaxclip._transforms import loss_scale as loss_scale
from optaxclip._transforms import skip_nonfinite as skip_nonfinite
from optaxclip._transforms import skip_spikes as skip_spikes
from optaxclip._transforms import zclip as zclip

__version__ = "0.1.0"
