"""Traces: what a run keeps of a prompt's attention, from which any part of any map is recomputed.

No T×T matrix is stored. Of each head there are the rotated queries and keys in half precision
(keys once per key-value group) and the log-sum-exp of each row, so that

    A[i, j] = exp(score(q_i · k_j) − LSE_i)        where query i sees key j, else 0

holds for any window of any head, whatever the length of the prompt. `capture` makes a trace and
checks it against the model's own rows; `Trace` reads one with numpy alone, without torch and
without the model.
"""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from interp.traces.pooling import Window as Window
    from interp.traces.pooling import decode as decode
    from interp.traces.pooling import encode as encode
    from interp.traces.recording import capture as capture
    from interp.traces.recording import trace_key as trace_key
    from interp.traces.trace import HeadTrace as HeadTrace
    from interp.traces.trace import LayerTrace as LayerTrace
    from interp.traces.trace import TowerTrace as TowerTrace
    from interp.traces.trace import Trace as Trace
    from interp.traces.trace import traces_of as traces_of

_HOMES = {
    "HeadTrace": "interp.traces.trace",
    "LayerTrace": "interp.traces.trace",
    "TowerTrace": "interp.traces.trace",
    "Trace": "interp.traces.trace",
    "Window": "interp.traces.pooling",
    "capture": "interp.traces.recording",
    "decode": "interp.traces.pooling",
    "encode": "interp.traces.pooling",
    "trace_key": "interp.traces.recording",
    "traces_of": "interp.traces.trace",
}
__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
