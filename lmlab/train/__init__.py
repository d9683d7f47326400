"""State, the one train step, the loop, and checkpoints. Imports no model, objective or data."""
