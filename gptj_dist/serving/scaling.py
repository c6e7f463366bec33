"""Decides how many pipelines there are, by what their requests ask of them.

Serve calls `scale` and applies its bounds and delays to the answer. Serve keeps a copy of this module's source in its
controller, so the module imports nothing of the package.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

FULL = 0.5
"""Load of a pipeline above which there should be one more: what is left is for requests that come while it starts."""

KEPT_S = 30.0
"""For how long a number of pipelines that was needed is kept. One too many costs less than one that starts again."""

DELAY_S = 1.0
"""For how long Serve must be given another number before it acts."""

SETTINGS: dict[str, Any] = {
    "policy": {"policy_function": f"{__name__}:scale"},
    "upscale_delay_s": DELAY_S,
    "downscale_delay_s": DELAY_S,
    "look_back_period_s": 5.0,
    "metrics_interval_s": 1.0,
}
"""For Serve's `autoscaling_config`. Pipelines publish five times in a look-back period."""

LOAD = "load"
"""Name of what pipelines publish: `Load.share`."""


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of pipelines that Serve should run, as a policy of its own interface.

    It is the largest number that was needed in the last `KEPT_S` seconds. Pipelines that still start have published
    nothing and count with what the others ask for. If none has published anything, the number stays.
    """
    series = (context.raw_metrics or {}).get(LOAD, {})
    loads = [values[-1].value for values in series.values() if values]
    if not loads:
        return context.target_num_replicas, context.policy_state
    now_s, needed = context.current_time, math.ceil(sum(loads) / FULL)
    earlier = [(at_s, number) for at_s, number in context.policy_state.get("needed", ()) if number > needed]
    kept = [(at_s, number) for at_s, number in earlier if now_s - at_s <= KEPT_S]
    return max([needed, *(number for _, number in kept)]), {"needed": [*kept, (now_s, needed)]}
