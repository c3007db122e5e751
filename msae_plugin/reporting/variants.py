"""Which methods of a comparison are rungs or mechanisms of the source's ladder."""

from __future__ import annotations

from msae_plugin.comparison.ladder import Variant, ladder_variants

VARIANTS = {variant.name: variant for variant in ladder_variants()}
_REFERENCES = {variant.name for variant in VARIANTS.values() if variant.against is None}


def variant_of(method: str) -> Variant | None:
    """The variant of a name; None for any other method."""
    return VARIANTS.get(method)


def is_variant(method: str) -> bool:
    """Whether a method belongs to the ladder alone: its references stand among others too."""
    return method in VARIANTS and method not in _REFERENCES
