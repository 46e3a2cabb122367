"""Sound that is made here, like speech: what the audio models of `package_models` are fed."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RATE = 16_000
VOWELS = np.array([(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)])
"""Formants in Hz of a, i, u, e, o of men (Peterson and Barney, 1952, table II)."""


def speech(generator: np.random.Generator, samples: int) -> Array:
    """Voiced and hissed syllables with pauses, over noise: float32, (samples,), within -1 and 1, at 16 kHz."""
    sound = np.zeros(samples)
    pitch, place = generator.uniform(85, 230), int(generator.uniform(0, 4000))
    while place < samples:
        length = int(generator.uniform(0.06, 0.35) * RATE)
        kind = generator.random()
        if kind < 0.75:
            part = _syllable(generator, length, pitch * generator.uniform(0.85, 1.2), hissed=kind < 0.2)
            end = min(samples, place + length)
            sound[place:end] += part[: end - place]
        place += length
    level = generator.uniform(0.05, 0.6) / max(1e-6, np.abs(sound).max())
    noisy = sound * level + generator.normal(0, 10 ** generator.uniform(-4, -1.5), samples)
    clipped: Array = np.clip(noisy, -1, 1).astype(np.float32)
    return clipped


def _syllable(generator: np.random.Generator, length: int, pitch: float, *, hissed: bool) -> Array:
    """The source of the voice or of a hiss, through the resonances of one vowel, faded in and out."""
    source = generator.normal(0, 1, length)
    if not hissed:
        turns = np.cumsum(np.full(length, pitch / RATE) * (1 + 0.05 * np.sin(np.arange(length) / RATE * 30)))
        source = 0.02 * source + np.where(np.diff(np.floor(turns), prepend=0) > 0, 10.0, 0.0)
    frequencies = np.fft.rfftfreq(length, 1 / RATE)
    formants = np.array([4500.0]) if hissed else VOWELS[generator.integers(len(VOWELS))]
    gain = sum(1 / (index + 1) / (1 + ((frequencies - f) / 90) ** 2) for index, f in enumerate(formants))
    return np.fft.irfft(np.fft.rfft(source) * gain, length) * np.hanning(length)


def log_power(sound: Array, window: int, hop: int) -> Array:
    """The logarithm of the power spectrum: float32, (frames, window / 2 + 1)."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hamming(window)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    found: Array = np.log10(np.maximum(power, 1e-12)).astype(np.float32)
    return found


def _many(generator: np.random.Generator, count: int, samples: int) -> Array:
    return np.stack([speech(generator, samples) for _ in range(count)])


def dnsmos(generator: np.random.Generator, count: int) -> dict[str, Array]:
    """Nine seconds of sound a sample."""
    return {"input_1": _many(generator, count, 144_160)}


def plcmos(generator: np.random.Generator, count: int) -> dict[str, Array]:
    """Spectra of four seconds, and a random listener each."""
    spectra = np.stack([log_power(sound, 512, 256) for sound in _many(generator, count, 4 * RATE)])
    listeners = generator.normal(0, 1, (count, 64)).astype(np.float32)
    return {"degraded_audio": spectra[:, None] * np.float32(np.log(10)), "rater_embed": listeners}


def silero_sequence(generator: np.random.Generator, count: int, windows: int = 62) -> dict[str, Array]:
    """Two seconds in windows of 512 samples, each behind the last 64 of the one before; the state starts at zero."""
    sound = _many(generator, count, 64 + 512 * windows)
    framed = np.lib.stride_tricks.sliding_window_view(sound, 576, axis=1)[:, ::512]
    state = np.zeros((count, 1, 1, 128), np.float32)
    return {"input": np.ascontiguousarray(framed), "h": state, "c": state}


def silero(generator: np.random.Generator, count: int) -> dict[str, Array]:
    """The first window of a sound: the state is zero."""
    whole = _many(generator, count, 4 * RATE)
    starts = generator.integers(0, 4 * RATE - 576, count)
    windows = np.stack([sound[start : start + 576] for sound, start in zip(whole, starts, strict=True)])
    state = np.zeros((count, 2, 1, 128), np.float32)
    return {"input": windows[:, None], "state": state, "sr": np.full(count, RATE)}
