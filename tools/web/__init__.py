"""A page for a trained model: an image and expressions in, masks out. `python -m tools.web`."""
