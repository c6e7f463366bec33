"""Logs the requests that a stage computes. Does not use Ray."""

from __future__ import annotations

import logging

from gptj_dist.engine.plan import Plan
from gptj_dist.logs import values

logger = logging.getLogger(__name__)


class RequestLog:
    """Logs the first and the last plan of each request on this stage."""

    def __init__(self) -> None:
        self._log_ids: dict[int, str] = {}

    def note(self, plan: Plan) -> None:
        """Logs the new and the released requests of a plan. Call before the stage computes the plan."""
        for number in plan.released:
            if (log_id := self._log_ids.pop(number, None)) is not None:
                logger.debug("request released", extra=values(request_id=log_id, number=number))
        for new in plan.new_requests:
            if new.log_id is not None:
                self._log_ids[new.request_id] = new.log_id
                logger.debug("request received", extra=values(request_id=new.log_id, number=new.request_id))
