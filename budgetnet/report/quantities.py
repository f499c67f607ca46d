"""Numbers for people: the prefixes of limits, units, shares and durations; a no-break space keeps number and unit."""

from __future__ import annotations

SPACE = "\u00a0"
TIMES, MINUS, MISSING = "\u00d7", "\u2212", "\u2013"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def si(value: float, digits: int = 3) -> str:
    """`9818112` as "9.82 M", with so many significant digits."""
    rounded = float(f"{value:.{digits}g}")
    for scale, prefix in PREFIXES:
        if abs(rounded) >= scale:
            return f"{rounded / scale:.{digits}g}{SPACE}{prefix}"
    return f"{rounded:.{digits}g}"


def apart(value: float, limit: float) -> tuple[str, str]:
    """Both numbers with just as many digits as it takes to tell them apart, 3 to 9."""
    for digits in range(3, 9):
        if value == limit or si(value, digits) != si(limit, digits):
            return si(value, digits), si(limit, digits)
    return si(value, 9), si(limit, 9)


def exact(value: float) -> str:
    """Every digit of a count, and of a mean of large ones, in groups of three; other numbers with 6 digits."""
    return f"{value:,.0f}" if (value == round(value) or abs(value) >= 1e5) and abs(value) < 1e15 else f"{value:.6g}"


def share(value: float, whole: float | None) -> str | None:
    """`1, 4` as "25 %"; None without a whole."""
    return percent(value / whole) if whole else None


def percent(ratio: float) -> str:
    """`0.9861` as "98.6 %"; two more digits close to 0 and to 1, where they make a difference."""
    digits = 1 if ratio in (0, 1) or (abs(ratio) >= 0.0095 and abs(ratio - 1) >= 0.0005) else 3
    text = f"{100 * ratio:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')}{SPACE}%"


def duration(seconds: float) -> str:
    """`3805` as "1 h 3 min"."""
    if seconds < 60:
        return f"{seconds:.3g}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{SPACE}h{SPACE}{minutes}{SPACE}min"
    return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s"


def shape(sizes: tuple[int, ...]) -> str:
    """`(16, 32, 32)` as 16 by 32 by 32, with signs."""
    return f"\u202f{TIMES}\u202f".join(map(str, sizes))
