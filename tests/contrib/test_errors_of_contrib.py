"""Bad arguments of `optaxclip.contrib` are refused, by the name of the call."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from optaxclip import contrib

SKETCH = {"q": 0.5}


@pytest.mark.parametrize(
    ("make", "argument", "rule", "value"),
    [
        (contrib.smooth_clip, "threshold", "non-negative", -1.0),
        (contrib.limit_growth, "ratio", "above 1", 1.0),
        (contrib.limit_growth, "floor", "non-negative", -1.0),
        (contrib.clippy, "relative", "non-negative", -0.1),
        (contrib.clippy, "absolute", "non-negative", np.nan),
        (contrib.sketched_quantile, "q", "in [0, 1]", 95.0),
        (contrib.sketched_quantile, "decay", "in (0, 1]", 0.0),
        (contrib.sketched_quantile, "accuracy", "between 0 and 1", 1.0),
        (contrib.sketched_quantile, "least", "positive", 0.0),
        (contrib.sketched_quantile, "most", "above `least`", 1e-12),
        (contrib.adagn, "decay", "in [0, 1)", 1.0),
        (contrib.adagn, "square_decay", "in [0, 1)", -0.1),
        (contrib.adagn, "eps", "non-negative", -1.0),
        (contrib.clip_coordinate_spikes, "factor", "positive", 0.0),
        (contrib.clip_coordinate_spikes, "decay", "in [0, 1)", 1.0),
        (
            contrib.clip_coordinate_spikes,
            "warmup",
            "an integer of at least 1",
            2.0,
        ),
        (
            contrib.with_error_feedback,
            "clip",
            "an `optax.GradientTransformation`",
            1.0,
        ),
    ],
)
def test_bad_arguments(make, argument, rule, value):
    given = SKETCH if make is contrib.sketched_quantile else {}
    message = f"`{make.__name__}({argument}=...)` must be {rule}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**given | {argument: value})


@pytest.mark.parametrize(
    "tx",
    [
        contrib.clip_coordinate_spikes(),
        contrib.with_error_feedback(optaxclip.clip_by_global_norm(1.0)),
    ],
)
def test_a_leaf_that_init_did_not_see(tx):
    state = tx.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"got leaves \['b'\] that `init` did not see"):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state)
    updates, _ = tx.update({"a": None}, state)  # nothing to measure
    assert updates == {"a": None}
