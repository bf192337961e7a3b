"""Composing a run from its configuration, training it, resuming it."""
