"""What every view of a run shares: smoothing, and numbers and times short enough to read."""


def smoothing(values: int) -> float:
    """The weight for `smoothed` with which a curve of so many values is easy to read."""
    return min(max(0.0, 1 - 40 / max(values, 1)), 0.98)


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential average, forwards and then backwards, so that the curve does not lag behind."""
    for _ in range(2):
        averaged, mean, total = [], 0.0, 0.0
        for value in values:
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
            averaged.append(mean / total)
        values = averaged[::-1]
    return values


def short_number(value: float) -> str:
    """12345678 as 12.3457M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
