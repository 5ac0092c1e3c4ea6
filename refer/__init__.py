"""The REFER data API: referring expressions over COCO images."""

from refer.refer import REFER

__all__ = ["REFER"]
