"""The kernel: measure, decide, apply, record; every clip and skip is one call of it."""

from optaxclip._kernel import find as find
from optaxclip._kernel.clip import ClipMetrics as ClipMetrics
from optaxclip._kernel.clip import ClipState as ClipState
from optaxclip._kernel.clip import clamp as clamp
from optaxclip._kernel.clip import clip_by as clip_by
from optaxclip._kernel.clip import clip_scale as clip_scale
from optaxclip._kernel.clip import rescale as rescale
from optaxclip._kernel.decide import count_if as count_if
from optaxclip._kernel.decide import decide as decide
from optaxclip._kernel.measure import Norm as Norm
from optaxclip._kernel.measure import handing_over as handing_over
from optaxclip._kernel.measure import initial as initial
from optaxclip._kernel.measure import measure as measure
from optaxclip._kernel.skip import GuardedStep as GuardedStep
from optaxclip._kernel.skip import SkipMetrics as SkipMetrics
from optaxclip._kernel.skip import SkipState as SkipState
from optaxclip._kernel.skip import guarded_step as guarded_step
from optaxclip._kernel.skip import not_made as not_made
from optaxclip._kernel.skip import skip_by as skip_by
from optaxclip._kernel.skip import without_loss as without_loss
