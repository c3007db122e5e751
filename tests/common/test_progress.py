"""What a display shows, and what libraries draw beside it."""

from __future__ import annotations

import io
import sys
import time
from types import ModuleType

import pytest
import tqdm
import tqdm.auto
from rich.console import Console

from msae_plugin.common import progress
from msae_plugin.common.progress import ConsoleProgress, shown_steps, training_display

ROW = {"loss": 12.5, "l0": 31.8, "explained_variance": 0.87, "dead_latents": 3.0}


def console(terminal: bool, width: int = 60) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=terminal, color_system=None), stream


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_bars_of_libraries_are_told_not_drawn(
    terminal: bool, training: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SHORT_BAR_SECONDS", 0.0)
    shown, stream = console(terminal, width=120)
    before = {name: vars(tqdm.tqdm)[name] for name in ("__init__", "display")}
    with training_display(shown) if training else shown_steps(shown):
        # A bar that is off outside of a terminal, as those of downloads are, is told of as well.
        with tqdm.auto.tqdm(total=4, desc="Loading weights", disable=None, mininterval=0) as bar:
            for _ in range(4):
                time.sleep(0.001)
                bar.update()
        assert list(tqdm.tqdm(range(3), desc="off", disable=True)) == [0, 1, 2]
    assert "Loading weights" in stream.getvalue()
    assert "off" not in stream.getvalue()
    out, err = capfd.readouterr()
    assert "it/s" not in stream.getvalue() + out + err
    assert {name: vars(tqdm.tqdm)[name] for name in before} == before


def test_short_bars_of_libraries_are_not_told() -> None:
    shown, stream = console(terminal=False)
    with shown_steps(shown):
        list(tqdm.tqdm(range(1000), desc="quick", mininterval=0))
    assert not stream.getvalue()


def test_bars_of_libraries_are_theirs_where_nothing_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with training_display(False), shown_steps(False):
        list(tqdm.tqdm(range(3), desc="theirs", file=sys.stderr))
    assert "theirs" in capsys.readouterr().err


def test_a_notebook_has_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Display(ModuleType):
        def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Display:
            shown.append("a new line")
            return self.update(data, raw=raw)

        def update(self, data: dict[str, str], *, raw: bool) -> Display:
            shown.append(data["text/plain"])
            return self

    monkeypatch.setitem(sys.modules, "IPython.display", Display("IPython.display"))
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    with shown_steps(notebook) as steps:
        steps("reading", 1, 8)
        steps("measuring", 1, 2)
    assert shown == ["a new line", "reading 1/8", "measuring 1/2"]


@pytest.mark.parametrize("width", [60, 100])
def test_the_training_display_fits_its_terminal(width: int) -> None:
    shown, _ = console(terminal=True, width=width)
    display = ConsoleProgress(shown)
    display.start(1_000_000, 0, ["multiscale_layer9", "batchtopk_layer9"])
    display.advance(250_000)
    display.metrics("multiscale_layer9", ROW)
    with shown.capture() as captured:
        shown.print(display._render())
    display.stop()
    lines = captured.get().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "25%" in captured.get()
    assert "250,000/1,000,000" in captured.get()
    assert "0.870  dead 3" in captured.get()
