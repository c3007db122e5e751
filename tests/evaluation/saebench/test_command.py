"""`msae saebench`: SAEBench's own scripts with `multiscale` registered."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_bench.sae_bench_utils import sae_selection_utils
from sae_lens.registry import SAE_CLASS_REGISTRY

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.saebench.command import run_saebench_script, saebench_scripts


def test_scripts_are_those_with_a_main_module() -> None:
    import sae_bench

    folder = Path(sae_bench.__file__).parent / "evals"
    assert saebench_scripts() == sorted(p.parent.name for p in folder.glob("*/main.py"))
    assert {"core", "unlearning", "scr_and_tpp", "mdl"} <= set(saebench_scripts())


@pytest.mark.parametrize(("evaluation", "script"), [("core", "core"), ("tpp", "scr_and_tpp")])
def test_arguments_reach_saebenchs_own_parser(
    evaluation: str, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.argv)
    with pytest.raises(SystemExit) as stopped:
        run_saebench_script(evaluation, ["--help"])
    assert stopped.value.code == 0
    assert sys.argv == before
    shown = capsys.readouterr().out
    assert shown.startswith("usage: msae saebench")
    assert "--sae_block_pattern" in shown or "sae_block_pattern" in shown
    with pytest.raises(SystemExit) as stopped:
        run_saebench_script(script, ["--no-such-option"])
    assert stopped.value.code == 2
    assert sys.argv == before


def test_the_script_sees_multiscale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def get_saes_from_regex(release: str, block: str) -> list[tuple[str, str]]:
        seen.append((release, block, "multiscale" in SAE_CLASS_REGISTRY))
        return []

    monkeypatch.setattr(sae_selection_utils, "get_saes_from_regex", get_saes_from_regex)
    monkeypatch.chdir(tmp_path)
    # SAEBench's own words for patterns that select nothing.
    with pytest.raises(AssertionError, match="No SAEs selected"):
        run_saebench_script(
            "absorption",
            ["--sae_regex_pattern", "mine", "--sae_block_pattern", "all", "--model_name", "gpt2",
             "--llm_batch_size", "1", "--llm_dtype", "float32"],
        )  # fmt: skip
    assert seen == [("mine", "all", True)]


def test_what_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, without: Callable[..., None]
) -> None:
    with pytest.raises(InputError, match="no evaluation 'sparse-probing': did you mean sparse_pr"):
        run_saebench_script("sparse-probing", [])
    with pytest.raises(InputError, match="choose from absorption, autointerp, core"):
        run_saebench_script("xyz", [])
    monkeypatch.setitem(sys.modules, "loguru", None)
    with pytest.raises(InputError, match="SAEBench's mdl needs the package loguru: pip install l"):
        run_saebench_script("mdl", [])
    without("sae_bench")
    with pytest.raises(InputError, match=r'needs sae-bench: pip install "msae-plugin\[eval\]"'):
        run_saebench_script("core", [])
