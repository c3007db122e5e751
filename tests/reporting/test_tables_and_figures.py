from __future__ import annotations

import builtins

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.reporting.canvas import pyplot as require_matplotlib


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"msae-plugin\[report\]"):
        require_matplotlib()
