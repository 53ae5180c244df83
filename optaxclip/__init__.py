"""Gradient clipping for JAX that is right everywhere and tells you what it did."""

from optaxclip import unit_axes as unit_axes
from optaxclip._clip import ClipMetrics as ClipMetrics
from optaxclip._clip import ClipState as ClipState
from optaxclip._clip import clamp as clamp
from optaxclip._clip import clip_by as clip_by
from optaxclip._clip import rescale as rescale
from optaxclip._metrics import metrics as metrics
from optaxclip._norms import global_norm as global_norm
from optaxclip._norms import leaf_norm as leaf_norm
from optaxclip._norms import leaf_rms as leaf_rms
from optaxclip._norms import unit_norm as unit_norm
from optaxclip._thresholds import constant as constant
from optaxclip._thresholds import lowest as lowest
from optaxclip._thresholds import relative as relative
from optaxclip._transforms import adaptive_grad_clip as adaptive_grad_clip
from optaxclip._transforms import clip_by_block_rms as clip_by_block_rms
from optaxclip._transforms import clip_by_global_norm as clip_by_global_norm
from optaxclip._transforms import clip_by_leaf_norm as clip_by_leaf_norm
from optaxclip._transforms import clip_by_value as clip_by_value

__version__ = "0.1.0"
