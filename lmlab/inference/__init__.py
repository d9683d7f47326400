"""Sampling and scoring over any language model."""
