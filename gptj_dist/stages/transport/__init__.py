"""How frames get from one stage to the next. `edge` says what a transport offers, and `open_transport` chooses it.

Another transport is one module with the classes of `edge`, and one line here.
"""

from gptj_dist.stages.transport.edge import Transport
from gptj_dist.stages.transport.zeromq import ZeroMQTransport

__all__ = ["open_transport"]


def open_transport(epoch: int) -> Transport:
    """The transport of one pipeline's edges; frames of other epochs are dropped."""
    return ZeroMQTransport(epoch)
