"""Figures with units that keep them short."""

_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def size(count: float) -> str:
    """Bytes in decimal units, `4.015 GB`."""
    return _scaled(count, _SIZES)


def duration(seconds: float) -> str:
    """Seconds, `1.234 ms`."""
    return _scaled(seconds, _TIMES)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for scale, unit in units:
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    scale, unit = units[-1]
    return f"{value / scale:.4g} {unit}"
