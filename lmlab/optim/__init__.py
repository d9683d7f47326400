"""Typed configs to optax chains, schedules, and groups of parameters by path."""
