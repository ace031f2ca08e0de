"""How a training tile is varied. numpy only; all of it follows from a tile and a random generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """The 8 flips and quarter turns, and changes of the values.

    Attributes:
        gain: spread of a factor on the distance from the mean, common to all bands.
        brightness: spread of an offset common to all bands, in standard deviations of a band.
        jitter: spread of an offset of each band, in its standard deviations.
        haze: most of `spectrum.haze` that is added to a tile, or a third as much taken off; half of the tiles stay.
    """

    gain: float = 0.1
    brightness: float = 0.1
    jitter: float = 0.05
    haze: float = 0.0

    def vary(
        self,
        tile: tuple[np.ndarray, np.ndarray, np.ndarray],
        out: tuple[np.ndarray, np.ndarray],
        rng: np.random.Generator,
        mean: np.ndarray,
        std: np.ndarray,
        haze: np.ndarray,
    ) -> np.ndarray:
        """Write a varied tile into its place in a batch.

        Args:
            tile: image (size, size, bands), labels (size, size) uint8, valid (size, size) bool.
            out: image (size, size, bands) float32 and labels (size, size) uint8, to be written.
            mean, std: of the bands, (bands,) float32.
            haze: see `spectrum.haze`, (bands,) float32.

        Returns:
            Which pixels of `out` are valid, (size, size) bool.
        """
        factor, offset = self.recolouring(rng, mean, std, haze)
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        image, labels, valid = tile
        # By whole rows, and pixels moved as one item each: numpy loops over the last axis, and a few bands are short.
        rows, width = image.reshape(len(image), -1), image.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):  # whatever lies under nodata
            varied = np.multiply(rows, np.tile(factor, width), dtype=np.float32, casting="unsafe")
            np.add(varied, np.tile(offset, width), out=varied)
        pixel = np.dtype((np.void, out[0].shape[-1] * out[0].itemsize))
        out[0].view(pixel)[..., 0] = turned(varied.view(pixel), turns, mirrored)
        out[1][:] = turned(labels, turns, mirrored)
        return turned(valid, turns, mirrored)

    def recolouring(
        self, rng: np.random.Generator, mean: np.ndarray, std: np.ndarray, haze: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A factor and an offset for each band, (bands,) float32."""
        factor = 1 + self.gain * rng.uniform(-1, 1)
        offset = self.brightness * rng.normal() + self.jitter * rng.normal(size=len(mean))
        offsets = mean * (1 - factor) + std * offset
        if self.haze:
            offsets += haze * (self.haze * rng.uniform(-1 / 3, 1) * (rng.random() < 0.5))
        return np.full(len(mean), factor, np.float32), offsets.astype(np.float32)


def turned(array: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    """Turn (height, width, ...) by quarters, then mirror it: a view."""
    array = np.rot90(array, turns)
    return array[:, ::-1] if mirrored else array
