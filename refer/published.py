"""Published sizes of and results on the datasets of the registry."""

from __future__ import annotations

from refer.datasets import Counts

# Sizes of the splits, by dataset, splitBy and split.
COUNTS: dict[str, dict[str, dict[str, Counts]]] = {
    "refcoco": {
        "unc": {
            "train": Counts(42404, 120624, 16994),
            "val": Counts(3811, 10834, 1500),
            "testA": Counts(1975, 5657, 750),
            "testB": Counts(1810, 5095, 750),
            "all": Counts(50000, 142210, 19994),
        },
        "google": {
            "train": Counts(40000, None, 19213),
            "val": Counts(5000, None, 4559),
            "test": Counts(5000, None, 4527),
        },
    },
    "refcoco+": {
        "unc": {
            "train": Counts(42278, 120191, 16992),
            "val": Counts(3805, 10758, 1500),
            "testA": Counts(1975, 5726, 750),
            "testB": Counts(1798, 4889, 750),
            "all": Counts(49856, 141564, 19992),
        }
    },
    "refcocog": {
        "umd": {
            "train": Counts(42226, 80512, 21899),
            "val": Counts(2573, 4896, 1300),
            "test": Counts(5023, 9602, 2600),
        },
        "google": {
            "train": Counts(44822, 85474, 24698),
            "val": Counts(5000, 9536, 4650),
        },
    },
    "grefcoco": {"unc": {"train": Counts(None, 209344, None), "all": Counts(None, 259859, None)}},
    "rrsisd": {
        "unc": {
            "train": Counts(12181, 12181, None),
            "val": Counts(1740, 1740, None),
            "test": Counts(3481, 3481, None),
            "all": Counts(17402, 17402, None),
        }
    },
    "refsegrs": {
        "official": {
            "train": Counts(2172, 2172, None),
            "val": Counts(431, 431, None),
            "test": Counts(1817, 1817, None),
            "all": Counts(4420, 4420, None),
        }
    },
    "risbench": {"official": {"all": Counts(52472, 52472, None)}},
    "refcoco-m": {"unc": {"val": Counts(2080, 5598, 1190)}},
}

# P@0.5, P@0.6, P@0.7, P@0.8, P@0.9, oIoU, mIoU in percent, by model and (dataset, splitBy, split).
PUBLISHED_ROWS: dict[str, dict[tuple[str, str, str], tuple[float, ...]]] = {
    "lavt": {
        ("refcoco", "unc", "val"): (84.46, 80.90, 75.28, 64.71, 34.30, 72.73, 74.46),
        ("refcoco", "unc", "testA"): (88.07, 85.17, 79.90, 68.52, 35.69, 75.82, 76.89),
        ("refcoco", "unc", "testB"): (79.12, 74.94, 69.17, 59.37, 34.45, 68.79, 70.94),
        ("refcoco+", "unc", "val"): (74.44, 70.91, 65.58, 56.34, 30.23, 62.14, 65.81),
        ("refcoco+", "unc", "testA"): (80.68, 77.96, 72.90, 62.21, 32.36, 68.38, 70.97),
        ("refcoco+", "unc", "testB"): (65.66, 61.85, 55.94, 47.56, 27.24, 55.10, 59.23),
        ("refcocog", "umd", "val"): (70.81, 65.28, 58.60, 47.49, 22.73, 61.24, 63.34),
        ("refcocog", "umd", "test"): (71.54, 66.38, 59.00, 48.21, 23.10, 62.09, 63.62),
        ("refcocog", "google", "val"): (71.16, 67.21, 61.76, 51.98, 27.30, 60.50, 63.66),
    },
    "lavt_one": {
        ("refcoco", "unc", "val"): (85.87, 82.13, 76.64, 65.45, 35.30, 73.50, 75.41),
        ("refcoco", "unc", "testA"): (88.47, 85.63, 80.57, 68.84, 35.71, 75.97, 77.31),
        ("refcoco", "unc", "testB"): (80.20, 76.49, 70.34, 60.12, 34.94, 69.33, 71.86),
        ("refcoco+", "unc", "val"): (76.19, 72.27, 66.82, 56.87, 30.15, 63.79, 67.65),
        ("refcoco+", "unc", "testA"): (82.50, 79.44, 74.00, 63.27, 31.99, 69.79, 72.53),
        ("refcoco+", "unc", "testB"): (68.03, 63.35, 57.29, 47.92, 26.98, 56.49, 61.22),
        ("refcocog", "umd", "val"): (75.82, 71.06, 63.99, 52.98, 27.31, 64.02, 67.41),
        ("refcocog", "umd", "test"): (76.12, 71.13, 64.58, 53.62, 28.03, 64.49, 67.45),
        ("refcocog", "google", "val"): (72.57, 68.65, 63.09, 53.33, 28.14, 61.31, 64.84),
    },
    "crossvlt": {
        ("refcoco", "unc", "val"): (85.82, 82.80, 77.49, 67.21, 35.97, 73.44, 75.48),
        ("refcoco", "unc", "testA"): (88.92, 86.25, 81.62, 69.79, 36.68, 76.16, 77.54),
        ("refcoco", "unc", "testB"): (81.35, 77.74, 72.27, 62.63, 37.64, 70.15, 72.69),
        ("refcoco+", "unc", "val"): (76.41, 73.09, 68.49, 59.09, 31.39, 63.60, 67.27),
        ("refcoco+", "unc", "testA"): (82.43, 79.57, 74.80, 64.65, 32.89, 69.10, 72.00),
        ("refcoco+", "unc", "testB"): (67.19, 63.31, 58.89, 49.93, 29.15, 55.23, 60.09),
        ("refcocog", "umd", "val"): (74.75, 70.45, 64.58, 54.21, 28.57, 62.68, 66.21),
        ("refcocog", "umd", "test"): (71.54, 66.38, 59.00, 48.21, 23.10, 63.75, 62.09),
    },
}

# Published rows that are not trustworthy.
ROW_NOTES = {
    ("crossvlt", "refcocog", "umd", "test"): (
        "P@K of this published row repeat LAVT's, digit for digit, and its mIoU is LAVT's oIoU; "
        "they look like a slip of the authors. Only its oIoU should be quoted."
    ),
}

# Results of models that are not in this project: percent, by (dataset, splitBy, split) and model.
OTHER_MODELS: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {
    ("grefcoco", "unc", "val"): {
        "ReLA, ResNet-50": {"cIoU": 39.53, "gIoU": 38.62},
        "ReLA, Swin-T": {"cIoU": 57.73, "gIoU": 56.86},
        "ReLA, Swin-B": {"cIoU": 62.42, "gIoU": 63.60},
        "ReLA, Swin-B, released weights": {"cIoU": 63.10, "gIoU": 66.34},
        "GSVA-7B": {"cIoU": 63.19, "gIoU": 66.43, "N_acc": 62.56, "T_acc": 99.62},
        "DeRIS-B": {"cIoU": 68.06, "gIoU": 74.10, "N_acc": 77.03},
        "DeRIS-L": {"cIoU": 72.00, "gIoU": 77.67, "N_acc": 82.22},
        "InstAlign": {"cIoU": 68.94, "gIoU": 74.34, "N_acc": 79.72},
    },
    ("ref-zom", "final", "test"): {
        "DMMI, Swin-B": {"oIoU": 68.77, "mIoU": 68.25},
        "InstAlign": {"mIoU": 70.81, "Acc": 94.23},
        "CoHD": {"mIoU": 69.81, "Acc": 93.34},
    },
    ("rrsisd", "unc", "val"): {
        "RMSIN": {
            **{"P@0.5": 74.66, "P@0.6": 68.22, "P@0.7": 57.41, "P@0.8": 45.29, "P@0.9": 24.43},
            **{"oIoU": 78.27, "mIoU": 65.10},
        },
    },
}
