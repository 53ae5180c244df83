"""Rules: `optax.GradientTransformation`s from norms to thresholds.

Their ``updates`` are the norms of the gradients, their ``params`` the norms of the
parameters, and what they return in place of updates are the thresholds.
"""

from optaxclip._thresholds.constant import as_rule as as_rule
from optaxclip._thresholds.constant import constant as constant
from optaxclip._thresholds.ema import ema as ema
from optaxclip._thresholds.lowest import lowest as lowest
from optaxclip._thresholds.quantile import quantile as quantile
from optaxclip._thresholds.relative import relative as relative
from optaxclip._thresholds.tracked_quantile import tracked_quantile as tracked_quantile
from optaxclip._thresholds.window_zscore import window_zscore as window_zscore
from optaxclip._thresholds.zscore import zscore as zscore
