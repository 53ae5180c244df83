"""Rules: `optax.GradientTransformation`s from norms to thresholds.

Their ``updates`` are the norms of the gradients, their ``params`` the norms of the
parameters, and what they return in place of updates are the thresholds.
"""

from optaxclip._thresholds._memory import Number as Number
from optaxclip._thresholds._memory import (
    are_scalars_of_one_dtype as are_scalars_of_one_dtype,
)
from optaxclip._thresholds._memory import at_bound as at_bound
from optaxclip._thresholds._memory import at_mean as at_mean
from optaxclip._thresholds._memory import elementwise as elementwise
from optaxclip._thresholds._memory import like as like
from optaxclip._thresholds._memory import no_bound as no_bound
from optaxclip._thresholds._memory import per_norm as per_norm
from optaxclip._thresholds._memory import reciprocal as reciprocal
from optaxclip._thresholds._memory import unchanged as unchanged
from optaxclip._thresholds.by_name import by_name as by_name
from optaxclip._thresholds.by_name import rule_by_name as rule_by_name
from optaxclip._thresholds.constant import Rule as Rule
from optaxclip._thresholds.constant import Threshold as Threshold
from optaxclip._thresholds.constant import as_rule as as_rule
from optaxclip._thresholds.constant import constant as constant
from optaxclip._thresholds.ema import average as average
from optaxclip._thresholds.ema import ema as ema
from optaxclip._thresholds.ema import smallest as smallest
from optaxclip._thresholds.known import KnownRule as KnownRule
from optaxclip._thresholds.known import known as known
from optaxclip._thresholds.lowest import lowest as lowest
from optaxclip._thresholds.quantile import quantile as quantile
from optaxclip._thresholds.relative import relative as relative
from optaxclip._thresholds.tracked_quantile import tracked_quantile as tracked_quantile
from optaxclip._thresholds.window_zscore import window_zscore as window_zscore
from optaxclip._thresholds.zscore import moments as moments
from optaxclip._thresholds.zscore import quartiles as quartiles
from optaxclip._thresholds.zscore import zscore as zscore
