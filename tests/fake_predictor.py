"""A stand-in for a trained model: it finds the pixels of a colour that an expression names."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from lib.errors import InputError

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


class FakePredictor:
    """The part of :class:`lib.predictor.Predictor` that the page uses.

    Args:
        attention: whether it has attention to words.
        wait: seconds that a prediction takes.
    """

    max_tokens = 6

    def __init__(self, attention: bool = True, wait: float = 0.0) -> None:
        self.attention, self.wait = attention, wait
        self.calls: list[str] = []
        self.tokenizer = None

    def predict(self, image: Image.Image, expressions: list[str]) -> list[Any]:
        """Probability 0.9 at the colour, 0.3 in a box around it, 0.1 elsewhere."""
        time.sleep(self.wait)
        print("asked for", *expressions, flush=True)
        self.calls += expressions
        return [self._one(np.asarray(image).astype(int), e) for e in expressions]

    def _one(self, pixels: np.ndarray, expression: str) -> Any:
        probability = np.full(pixels.shape[:2], 0.1, np.float32)
        for name, color in COLORS.items():
            if name in expression.lower():
                near = np.abs(pixels - color).sum(2) < 90
                rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
                if len(rows):
                    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                    probability[box] = 0.3
                probability[near] = 0.9
        mask = probability > 0.5
        score = float(probability[mask].mean()) if mask.any() else 0.0
        return SimpleNamespace(
            mask=mask, probability=probability, score=score, expression=expression
        )

    def draw_attention(self, image: Image.Image, expression: str, prediction: Any) -> Image.Image:
        """A plain image, as wide as the expression has words."""
        if not self.attention:
            raise InputError("--attention: with fusion 'mean' pixels do not attend to words")
        return Image.new("RGB", (100 * len(expression.split()), 50), "gray")

    def is_cut(self, expression: str) -> bool:
        """Words count as tokens."""
        return len(expression.split()) > self.max_tokens


def main() -> None:
    """Run ``python -m tools.web`` with this model; it prints what it is asked for."""
    import utils
    from lib.predictor import Predictor
    from tools.web.__main__ import main as web

    def load(path: str, **_: object) -> FakePredictor:
        return FakePredictor(attention=path != "no-attention", wait=0.3)

    Predictor.from_checkpoint = load  # type: ignore[method-assign,assignment]
    utils.run_script(web)


if __name__ == "__main__":
    main()
