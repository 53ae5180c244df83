"""The named transformations: each a norm, a rule and a way to apply it."""

from optaxclip._transforms.adaptive import adagc as adagc
from optaxclip._transforms.adaptive import zclip as zclip
from optaxclip._transforms.cotangent import clip_cotangent as clip_cotangent
from optaxclip._transforms.fixed import adaptive_grad_clip as adaptive_grad_clip
from optaxclip._transforms.fixed import clip_by_block_rms as clip_by_block_rms
from optaxclip._transforms.fixed import clip_by_global_norm as clip_by_global_norm
from optaxclip._transforms.fixed import clip_by_leaf_norm as clip_by_leaf_norm
from optaxclip._transforms.fixed import clip_by_value as clip_by_value
from optaxclip._transforms.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from optaxclip._transforms.percentile import autoclip as autoclip
from optaxclip._transforms.percentile import clip_by_percentile as clip_by_percentile
from optaxclip._transforms.scale_state import LossScaleState as LossScaleState
from optaxclip._transforms.scale_state import loss_scale as loss_scale
from optaxclip._transforms.skips import skip_nonfinite as skip_nonfinite
from optaxclip._transforms.skips import skip_spikes as skip_spikes
from optaxclip._transforms.subtree import clip_by_subtree_norm as clip_by_subtree_norm
