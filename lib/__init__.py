"""Models, losses, metrics and the training engine of LAVT."""
