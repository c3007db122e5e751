"""The figures of a result in a notebook are those of its report."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_inputs import comparison, row, write_comparison, write_evaluation, write_run

from msae_plugin.api import Result
from msae_plugin.common.errors import InputError
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import read_sources

PNG = b"\x89PNG"


def result(folder: Path) -> Result[None]:
    return Result("compare", folder, None, [])


def test_a_comparison_is_drawn_as_in_its_report(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", comparison())
    shown = result(folder).plot()
    in_report = {figure.name: figure.png for figure in build(read_sources([folder]))[0].figures()}
    assert [figure.name for figure in shown] == ["language-model-pareto-explained-variance"]
    assert all(in_report[figure.name] == figure.png for figure in shown)
    html = shown._repr_html_()
    assert html.count("<img") == 1
    assert "data:image/png;base64,iVBOR" in html
    (file,) = shown.save(tmp_path / "pictures")
    assert file.read_bytes().startswith(PNG)


@pytest.mark.parametrize("metric", ["dead", "dead_latents", "heldout/dead_latents"])
def test_one_metric_by_its_short_or_full_name(tmp_path: Path, metric: str) -> None:
    folder = write_comparison(tmp_path / "cmp", comparison())
    (figure,) = result(folder).plot(metric)
    assert figure.name.endswith("-pareto-dead")


def test_a_run_shows_its_training_and_an_evaluation_its_saes(tmp_path: Path) -> None:
    run = result(write_run(tmp_path / "run"))
    names = [figure.name for figure in run.plot()]
    assert names == ["training-explained-variance-l0-8", "training-dead-latents-l0-8"]
    assert [figure.name for figure in run.plot("dead_latents")] == names[1:]
    evaluated = result(write_evaluation(tmp_path / "eval")).plot()
    assert [figure.name for figure in evaluated] == ["evaluation-eval-metrics"]


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", comparison())
    with pytest.raises(InputError, match="did you mean 'explained_variance'"):
        result(folder).plot("explained_varianc")
    alone = comparison(rows=[row("batchtopk", 8.0, 1)])
    with pytest.raises(InputError, match="nothing to draw"):
        result(write_comparison(tmp_path / "one", alone)).plot()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds none of"):
        result(tmp_path / "empty").plot()
