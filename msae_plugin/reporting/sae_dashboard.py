"""What running SAEDashboard beside this package needs."""

from __future__ import annotations

import importlib.util

PACKAGE = "sae_dashboard"
INSTALL = (
    "pip install --no-deps sae-dashboard==0.8.0 decode-clt eindex-callum dataclasses-json "
    "'marshmallow<4' typing-inspect mypy-extensions (it declares transformer-lens<3, and runs with "
    "3.9)"
)


def is_installed() -> bool:
    """Whether it can be imported here."""
    return importlib.util.find_spec(PACKAGE) is not None
