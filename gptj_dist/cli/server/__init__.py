"""Verbs that start, watch and plan a server."""
