"""Stages that take a given time in place of computing, in a real server."""
