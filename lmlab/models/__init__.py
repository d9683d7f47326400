"""Language models as records of pure functions. The only package that imports flax.linen."""
