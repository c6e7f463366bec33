"""Verbs that make text."""
