"""How a plan says numbers."""

GIB = 2**30


def in_gib(size: int | float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.3g} MiB"


def short(value: int | float) -> str:
    """Four digits, and a letter for thousands."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
