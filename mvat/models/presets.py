"""Presets of Manner, named by their cost on 4 s of 16 kHz audio where the name carries a number."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # MANNER's own three sizes (Park et al., ICASSP 2022).
    "base": {"hidden": 60},
    "large": {"hidden": 120},
    "small": {"hidden": 60, "attention_layers": "deepest"},
    # Students; their widths are our definition.
    "s-19.8gf": {"hidden": 24},
    "s-8.1gf": {"hidden": 12},
    "s-4.1gf": {"hidden": 8},
}
