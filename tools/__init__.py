"""Commands beside the main scripts: python -m tools.<name>."""
