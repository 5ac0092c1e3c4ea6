"""The published results, and whether a measured number may be compared with them."""

from __future__ import annotations

from dataclasses import dataclass

from lib.evaluation.metrics import COLUMNS
from lib.evaluation.protocol import Protocol
from refer.datasets import UNVERIFIED, published_counts
from refer.published import OTHER_MODELS, PUBLISHED_ROWS, ROW_NOTES

TITLES = {
    "lavt": "LAVT, cross entropy",
    "lavt_one": "LAVT, multi-class Dice",
    "crossvlt": "CrossVLT",
}


@dataclass(frozen=True)
class Published:
    """The published numbers of a split.

    Attributes:
        title: of the published model.
        values: percent, by column, of which some may be missing; empty if other data were evaluated
            here.
        reason: why a measured number must not be compared with it; '' if it may.
        note: a caveat on the row; '' for none.
    """

    title: str
    values: dict[str, float]
    reason: str = ""
    note: str = ""


def look_up(
    model: str,
    data: tuple[str, str, str],
    protocol: Protocol,
    objects: int,
    expressions: int,
) -> Published | None:
    """The published row of a model and split.

    Args:
        model: its name.
        data: dataset, splitBy, split.
        protocol: of the measured number.
        objects, expressions: size of the split here; nothing was published for a subset, or for
            other data in the same folder.

    Returns:
        None if nothing was published.
    """
    values = PUBLISHED_ROWS.get(model, {}).get(data)
    if values is None:
        return None
    size = published_counts(data[0], data[1])[data[2]]
    expected = None if data in UNVERIFIED else size.sentences
    if objects != size.refs or expected not in (None, expressions):
        reason = f"other data: {objects} objects here, {size.refs} published"
        return Published(TITLES[model], {}, reason)
    row = dict(zip(COLUMNS, values, strict=True))
    reason = "" if protocol.is_standard else f"other protocol: {protocol.label}"
    return Published(TITLES[model], row, reason, ROW_NOTES.get((model, *data), ""))


def other_models(data: tuple[str, str, str], objects: int) -> list[Published]:
    """Results of other models on a split, which are shown but not compared.

    Args:
        data: dataset, splitBy, split.
        objects: size of the split here; none are shown for a known other size.
    """
    size = published_counts(data[0], data[1]).get(data[2])
    if size is not None and size.refs not in (None, objects):
        return []
    rows = OTHER_MODELS.get(data, {})
    return [Published(name, values, reason="another model") for name, values in rows.items()]
