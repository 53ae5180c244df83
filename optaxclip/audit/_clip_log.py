"""A log that a run writes, and that shows itself."""

import html
from typing import Any

from optaxclip.audit import _report
from optaxclip.audit._log import Writer


class ClipLog(Writer):
    """Keeps what :func:`optaxclip.record_history` recorded in a file of JSON Lines.

    Rows are only ever appended, and each call of :meth:`update` hands all that is new
    to the system at once: a run that is killed leaves every row behind that had been
    drained. A log that exists is continued. The format is described in ``docs/log.md``;
    :func:`read` reads it.

    Args:
      path: The file; folders that are missing are made. One run at a time writes it.
      params: The parameters, of which the log notes the number of elements.
      transform: A text that says how the run clips, noted in the log.
      hyperparameters: A dict of whatever else shall be noted. What JSON does not know
        is noted as a text of at most 1,000 characters, and never stops the log.
      on_error: What a full disk or a path that cannot be written (a folder, a pipe)
        does: ``"warn"`` warns once, and training goes on; later updates try again and
        write what the recorder still holds. ``"raise"`` raises the error.

    Attributes:
      missed: Steps that the log is missing: the recorder forgot them before they were
        drained. Warned of once; ``read(path).missed`` says which.
      unwritten: Steps that could not be written, yet.

    Raises:
      ValueError: the file exists and is no log, or is damaged. It is left as it is:
        only a line that a crash cut off is ever removed.

    *Several processes.* Only process 0 touches the file, so make the log after
    ``jax.distributed.initialize``; every process may call :meth:`update`.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> import optaxclip.audit
      >>> tx = optaxclip.record_history(
      ...     optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      ... )
      >>> path = pathlib.Path(tempfile.mkdtemp(), "clip.jsonl")
      >>> log = optaxclip.audit.ClipLog(path, transform="clip_by_global_norm(1.0)")
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for size in [0.5, 2.0, 8.0]:
      ...     grads = jnp.array([size, 0.0])
      ...     updates, state = tx.update(grads, state, params)
      >>> log.update(state)
      3
      >>> print(optaxclip.audit.read(path).scale)
      [1.    0.5   0.125]
    """

    def plot(self) -> Any:
        """A figure of the log so far, as of :meth:`LogData.plot`."""
        return self.read().plot()

    def __repr__(self) -> str:
        name = f"ClipLog({str(self.path)!r})"
        if self._leaf_names is None:
            return f"{name}: nothing written"
        if not self.path.exists():
            return f"{name}: the file is gone"
        return f"{name}\n{_report.summary(self)}"

    def _repr_html_(self) -> str:
        is_there = self._leaf_names is not None and self.path.exists()
        if not is_there:
            return f"<pre>{html.escape(repr(self))}</pre>"
        return _report.cell(self.read(), repr(self))
