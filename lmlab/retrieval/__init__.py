"""Texts to vectors, and the nearest of many vectors."""
