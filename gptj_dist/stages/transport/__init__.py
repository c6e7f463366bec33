"""How frames get from one stage to the next: in-process queues or ZeroMQ sockets."""
