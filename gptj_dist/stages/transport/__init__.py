"""Carries frames from stage to stage.

`edge` defines what a transport offers, and `open_transport` chooses one: another transport is one module with the
classes of `edge`, and one line here. Knows no tensors beyond their bytes.
"""

from gptj_dist.stages.transport.edge import Transport
from gptj_dist.stages.transport.zeromq import ZeroMQTransport

__all__ = ["arrivals", "codec", "edge", "files", "frames", "guard", "leash", "open_transport", "parcels"]


def open_transport(epoch: int) -> Transport:
    """The transport of one pipeline's edges; frames of other epochs are dropped."""
    return ZeroMQTransport(epoch)
