"""Runs the stages of a pipeline: in one process, or as Ray actors joined by ZeroMQ edges."""
