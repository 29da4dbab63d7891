"""Numbers in words, one way everywhere; what is missing is "not measured"."""

from __future__ import annotations

from secateur.core.statistics import Interval

__all__ = ["NOT_MEASURED", "amount", "level", "many", "percent", "points", "sized", "span", "times", "tiny"]

NOT_MEASURED = "not measured"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as percent; whole percents without a decimal where `digits` is 0.

    Examples:
        >>> percent(0.875), percent(None)
        ('87.5 %', 'not measured')
    """
    return NOT_MEASURED if share is None else f"{100 * share:.{digits}f} %"


def level(sparsity: float) -> str:
    """A sparsity as it was asked for, without trailing zeros; those of rounds (1 - 0.8^n) to one decimal.

    Examples:
        >>> level(0.9), level(0.9375), level(1 - 0.8**9)
        ('90 %', '93.75 %', '86.6 %')
    """
    exact = round(100 * sparsity, 4)
    return f"{exact if round(exact, 2) == exact else round(exact, 1):g} %"


def points(difference: float, signed: bool = False) -> str:
    """A difference of shares in points, one decimal.

    Examples:
        >>> points(0.123), points(-0.0001, signed=True)
        ('12.3', '0.0')
    """
    value = round(100 * difference, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:+.1f}" if signed and value else f"{value:.1f}"


def span(interval: Interval) -> str:
    """Both ends in points.

    Examples:
        >>> span(Interval(0.1, 0.098, 0.146, 5, "t"))
        '9.8..14.6'
    """
    if interval.low is None or interval.high is None:
        return "no interval"
    return f"{points(interval.low)}..{points(interval.high)}"


def many(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun.

    Examples:
        >>> many(1, "seed"), many(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def amount(value: float | None) -> str:
    """A count with thousands separated.

    Examples:
        >>> amount(1234567), amount(None)
        ('1,234,567', 'not measured')
    """
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def sized(value: float | None) -> str:
    """Bytes in powers of 1024.

    Examples:
        >>> sized(900), sized(2048)
        ('900 B', '2.0 KiB')
    """
    if value is None:
        return NOT_MEASURED
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def times(before: float | None, after: float | None) -> str:
    """How many times smaller `after` is.

    Examples:
        >>> times(100, 25), times(1, None)
        ('4.00x smaller', 'not measured')
    """
    if before is None or after is None or before <= 0 or after <= 0:
        return NOT_MEASURED
    return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"


def tiny(value: float | None) -> str:
    """A small number in three digits.

    Examples:
        >>> tiny(1.25e-7), tiny(0.0)
        ('1.25e-07', '0')
    """
    return NOT_MEASURED if value is None else f"{value:.3g}"
