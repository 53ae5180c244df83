"""Rules: `optax.GradientTransformation`s from norms to thresholds.

Their ``updates`` are the norms of the gradients, their ``params`` the norms of the
parameters, and what they return in place of updates are the thresholds.
"""

from optaxclip._thresholds.constant import as_rule as as_rule
from optaxclip._thresholds.constant import constant as constant
from optaxclip._thresholds.lowest import lowest as lowest
from optaxclip._thresholds.relative import relative as relative
