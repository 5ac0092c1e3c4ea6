"""Convert data of one's own to a folder of the REFER layout: ``python -m refer.convert``."""
