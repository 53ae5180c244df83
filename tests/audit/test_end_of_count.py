"""Where the count of a recorder ends."""

import warnings

import jax
import jax.numpy as jnp

import optaxclip
from optaxclip.audit import ClipLog


def test_the_end_of_the_count_is_told_once_a_log(tmp_path):
    tx = optaxclip.record_history(optaxclip.clip_by_global_norm(1.0), length=4)
    state = tx.init(jnp.zeros(2))
    update = jax.jit(tx.update)
    state = state._replace(history_count=jnp.int32(2**31 - 2))
    log = ClipLog(tmp_path / "clip.jsonl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.update(state)  # the last steps are at hand, earlier ones a gap
        _, state = update(jnp.ones(2), state)
        for _ in range(3):
            log.update(state)
            _, state = update(jnp.ones(2), state)
    messages = [str(warning.message) for warning in caught]
    assert [text for text in messages if "no further" in text] == [
        "`ClipLog.update`: the recorder has counted 2147483647 steps and counts no "
        "further: rows from here on are lost. Start a fresh recorder, with a log of "
        "its own."
    ]
    assert "are missing" in messages[0]
    assert {warning.filename for warning in caught} == {__file__}
