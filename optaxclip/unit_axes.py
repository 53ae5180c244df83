"""Which axes of a leaf belong to one unit, that is, feed one output.

A *unit* is what adaptive gradient clipping measures and scales by itself: the row,
column or filter of weights behind one output. Which axes those are depends on the
library that laid out the weights, not on their rank. Each function here takes the path
and the array of a leaf and returns the axes to sum over. Pass it as the ``axis=`` of
:func:`optaxclip.unit_norm` or :func:`optaxclip.adaptive_grad_clip`:

=====================  ======================================  =======================
function               layout                                  used by
=====================  ======================================  =======================
:func:`by_rank`        guessed from the rank, as optax does    the default
:func:`output_last`    ``(..., inputs, outputs)``              Flax, Haiku
:func:`output_first`   ``(outputs, inputs, ...)``              Equinox, PyTorch
:func:`stacked`        one more leading axis, of layers        ``nn.scan``, ``nnx.vmap``
:func:`flax`           as its layers have it, by their names   Flax with attention
=====================  ======================================  =======================
"""

from optaxclip._norms import by_rank as by_rank
from optaxclip._norms import flax as flax
from optaxclip._norms import output_first as output_first
from optaxclip._norms import output_last as output_last
from optaxclip._norms import stacked as stacked

__all__ = [
    "by_rank",
    "flax",
    "output_first",
    "output_last",
    "stacked",
]
