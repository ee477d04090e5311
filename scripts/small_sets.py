#!/usr/bin/env python
"""Make small sets of clips or of sound, to try systems of video and audio without a download.

`digits` writes an .npz file with clips of scikit-learn's handwritten digits, one for each way they go: eight frames
of 16x16 pixels in which it moves straight on and bounces off the edges. `strings` writes a WAV file for each plucked
string: the algorithm of Karplus and Strong (Computer Music Journal 7, 1983), by notes of two octaves, each plucked anew
many times.

    python scripts/small_sets.py digits moving-digits.npz
    python scripts/small_sets.py strings plucked
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bessemer.data.fields import wave_file

FRAMES, CANVAS = 8, 16
RATE, SAMPLES = 4000, 2048
NOTES = {"c": 130.81, "e": 164.81, "g": 196.0, "b": 246.94}
"""Pitch class -> frequency in Hz of its lower octave."""


def moving(digit: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frames [8, 16, 16] in which an image [8, 8] moves by one or two pixels per frame in each direction."""
    room = CANVAS - len(digit)
    place = rng.integers(0, room + 1, 2)
    step = rng.integers(1, 3, 2) * rng.choice([-1, 1], 2)
    frames = np.zeros((FRAMES, CANVAS, CANVAS), dtype=np.uint8)
    for frame in frames:
        y, x = place
        frame[y : y + len(digit), x : x + len(digit)] = digit
        place = place + step
        beyond = (place < 0) | (place > room)
        place = np.where(place < 0, -place, np.where(place > room, 2 * room - place, place))
        step = np.where(beyond, -step, step)
    return frames


def write_digits(file: Path, ways: int) -> int:
    """A clip for each digit and way, as `images` [N, FRAMES, CANVAS, CANVAS, 1] and `labels` [N]."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    clips = [moving(digit, rng) for _ in range(ways) for digit in pixels]
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, images=np.stack(clips)[..., None], labels=np.tile(digits.target, ways))
    return len(clips)


def pluck(frequency: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """A string that begins as noise and loses its high overtones first, [SAMPLES]."""
    period = round(RATE / frequency)
    out = np.empty(SAMPLES + period)
    out[:period] = rng.uniform(-1, 1, period)
    out[:period] -= out[:period].mean()
    for t in range(period, len(out)):
        before = out[t - period - 1] if t > period else out[0]
        out[t] = 0.498 * (out[t - period] + before)
    sound = out[period:] * rng.uniform(0.5, 0.9)
    return np.round(32767 * sound).astype(np.int16)


def write_strings(folder: Path, plucks: int) -> int:
    """One sound for each note, octave and pluck, as `<note>/<octave>-<pluck>.wav`."""
    rng = np.random.default_rng(0)
    for note, frequency in NOTES.items():
        (folder / note).mkdir(parents=True, exist_ok=True)
        for octave in (1, 2):
            for number in range(plucks):
                sound = pluck(frequency * octave * rng.uniform(0.99, 1.01), rng)
                (folder / note / f"{octave}-{number:04d}.wav").write_bytes(wave_file(sound, RATE))
    return len(NOTES) * 2 * plucks


def main() -> None:
    """Make one of the sets."""
    parser = argparse.ArgumentParser(description="Make a small set of clips or of sound.")
    parser.add_argument("what", choices=("digits", "strings"))
    parser.add_argument("place", type=Path, help="file to write, or directory of sounds to make")
    parser.add_argument("--each", type=int, default=None, help="ways per digit (4), or plucks per note (300)")
    options = parser.parse_args()
    made = (
        write_digits(options.place, options.each or 4)
        if options.what == "digits"
        else write_strings(options.place, options.each or 300)
    )
    print(f"{options.place}: {made} samples")


if __name__ == "__main__":
    main()
