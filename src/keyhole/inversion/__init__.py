"""Model inversion: images of a class from a trained network alone, by way of what public images look like."""
