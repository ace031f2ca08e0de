"""How a training tile is varied. numpy only; all of it follows from a tile and a random generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """The 8 flips and quarter turns, and changes of the values, in standard deviations of a band.

    Attributes:
        gain: spread of a factor on the distance from the mean, common to all bands.
        brightness: spread of an offset common to all bands.
        jitter: spread of an offset of each band.
    """

    gain: float = 0.1
    brightness: float = 0.1
    jitter: float = 0.05

    def vary(
        self,
        tile: tuple[np.ndarray, np.ndarray, np.ndarray],
        out: tuple[np.ndarray, np.ndarray],
        rng: np.random.Generator,
        mean: np.ndarray,
        std: np.ndarray,
    ) -> np.ndarray:
        """Write a varied tile into its place in a batch.

        Args:
            tile: image (size, size, bands), labels (size, size) uint8, valid (size, size) bool.
            out: image (size, size, bands) float32 and labels (size, size) uint8, to be written.
            mean, std: of the bands, (bands,) float32.

        Returns:
            Which pixels of `out` are valid, (size, size) bool.
        """
        factor, offset = self.recolouring(rng, mean, std)
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        image, labels, valid = (turned(part, turns, mirrored) for part in tile)
        np.multiply(image, factor, out=out[0], casting="unsafe")
        np.add(out[0], offset, out=out[0])
        out[1][:] = labels
        return valid

    def recolouring(self, rng: np.random.Generator, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A factor and an offset for each band, (bands,) float32."""
        factor = 1 + self.gain * rng.uniform(-1, 1)
        offset = self.brightness * rng.normal() + self.jitter * rng.normal(size=len(mean))
        return np.full(len(mean), factor, np.float32), (mean * (1 - factor) + std * offset).astype(np.float32)


def turned(array: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    """Turn (height, width, ...) by quarters, then mirror it: a view."""
    array = np.rot90(array, turns)
    return array[:, ::-1] if mirrored else array
