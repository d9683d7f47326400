"""Losses: functions of (params, batch, key) that return sums and weights, never means."""
