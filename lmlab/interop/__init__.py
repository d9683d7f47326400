"""Real models in and out."""
