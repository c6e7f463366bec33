"""Decides how many pipelines there are, by what their requests need.

Serve calls a `Scale` and applies its bounds and delays to the answer. Serve keeps a copy of this module's source in its
controller, so the module imports nothing of the package.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

KEPT_S = 30.0
"""For how long a number of pipelines that was needed is kept. One too many costs less than one that starts again."""

SETTINGS: dict[str, Any] = {
    "policy": {"policy_function": f"{__name__}:Scale"},
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "look_back_period_s": 5.0,
    "metrics_interval_s": 0.5,
}
"""For Serve's `autoscaling_config`. Pipelines publish ten times in a look-back period. The first request to a server
that sleeps waits until the ingress reports that it waits: half of `metrics_interval_s` on average, and at most that.
"""

NEEDED = "needed"
"""Name of what pipelines publish: `Load.pipelines`."""


class Scale:
    """The number of pipelines that Serve should run, as a policy of its own interface.

    It is the largest number that was needed in the last `kept_s` seconds. Pipelines that still start have published
    nothing, and count with what the others need. If none has published anything, the number stays.

    Args:
        kept_s: see `KEPT_S`.
    """

    def __init__(self, kept_s: float = KEPT_S) -> None:
        self._kept_s = kept_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Called by Serve, ten times a second."""
        series = (context.raw_metrics or {}).get(NEEDED, {})
        published = [values[-1].value for values in series.values() if values]
        if not published:
            return context.target_num_replicas, context.policy_state
        now_s, needed = context.current_time, math.ceil(sum(published))
        earlier = [(at_s, number) for at_s, number in context.policy_state.get("needed", ()) if number > needed]
        kept = [(at_s, number) for at_s, number in earlier if now_s - at_s <= self._kept_s]
        return max([needed, *(number for _, number in kept)]), {"needed": [*kept, (now_s, needed)]}
