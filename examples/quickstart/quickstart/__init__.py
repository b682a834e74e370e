"""A plain Flower app: ten clients learn handwritten digits."""
