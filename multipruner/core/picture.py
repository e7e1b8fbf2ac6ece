"""The shape of a model in characters."""

from __future__ import annotations

from .structure import Structure

_BARS = " ▁▂▃▄▅▆▇█"


def bar(part: int, whole: int) -> str:
    """One character whose height is the share that stays; a dot for nothing."""
    if not part:
        return "·"
    return _BARS[max(1, round(8 * part / whole))]


def picture(structure: Structure, dense: Structure) -> str:
    """The shape of a model: one character per decoder layer, its height what the layer keeps, a dot for nothing."""
    heads = "".join(bar(size.query_heads, full.query_heads) for size, full in zip(structure, dense, strict=True))
    channels = "".join(bar(size.channels, full.channels) for size, full in zip(structure, dense, strict=True))
    ruler = "".join(str(number // 10 % 10) if number % 10 == 0 else " " for number in range(len(dense))).rstrip()
    return "\n".join((f"layer      {ruler}", f"attention  {heads}", f"MLP        {channels}", *_kept(structure, dense)))


def _kept(structure: Structure, dense: Structure) -> tuple[str, str]:
    """What stays, in words."""

    def of(name: str) -> str:
        return f"{sum(getattr(s, name) for s in structure):,} of {sum(getattr(s, name) for s in dense):,}"

    return (
        f"kept: {structure.count('attention')} of {dense.count('attention')} attention blocks "
        f"({of('query_heads')} query heads)",
        f"      {structure.count('mlp')} of {dense.count('mlp')} MLP blocks ({of('channels')} channels)",
    )
