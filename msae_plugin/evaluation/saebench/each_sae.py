"""The steps that all adapters share: one SAE after another, each with its own result file."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
from sae_lens import SAE

from msae_plugin.common.files import file_written_atomically
from msae_plugin.evaluation.outcomes import (
    SAEBENCH_ID,
    Reporter,
    ScoreResult,
    failure,
    result_file,
)
from msae_plugin.saes.load import EvaluatedSAE

logger = logging.getLogger(__name__)


def evaluate_each(
    evaluation: str,
    saes: Sequence[EvaluatedSAE],
    evaluate: Callable[[EvaluatedSAE], ScoreResult],
    report: Reporter,
    finally_: Callable[[], None] = lambda: None,
) -> dict[str, ScoreResult]:
    """Evaluate SAEs one by one: whatever one raises is its own result, and the others go on.

    Args:
        evaluation: For the progress display and the log.
        saes: The SAEs.
        evaluate: Evaluates one.
        report: Shows progress.
        finally_: Called after each SAE: puts right what SAEBench leaves behind in the model.
    """
    found: dict[str, ScoreResult] = {}
    for number, evaluated in enumerate(saes):
        report(f"{evaluation}: {evaluated.name}", number, len(saes))
        try:
            found[evaluated.name] = evaluate(evaluated)
        except Exception as error:
            logger.info("%s: %s failed", evaluation, evaluated.name, exc_info=True)
            found[evaluated.name] = failure(error)
        finally:
            finally_()
    return found


def write_result(
    kind: type[Any], config: Any, evaluated: EvaluatedSAE, sae: SAE[Any], output: Path, **parts: Any
) -> Path:
    """Write SAEBench's JSON of one SAE, whole or not at all.

    Args:
        kind: SAEBench's class of the whole file.
        config: The settings.
        evaluated: The SAE.
        sae: The copy of it that was evaluated.
        output: The folder.
        parts: The fields of `kind` that are the evaluation's own.
    """
    result = kind(
        eval_config=config,
        eval_id=get_eval_uuid(),
        datetime_epoch_millis=int(time.time() * 1000),
        sae_bench_commit_hash=get_sae_bench_version(),
        sae_lens_id=SAEBENCH_ID,
        sae_lens_release_id=evaluated.name,
        sae_lens_version=get_sae_lens_version(),
        sae_cfg_dict=sae.cfg.to_dict(),
        **parts,
    )
    file = result_file(output, evaluated)
    with file_written_atomically(file) as temporary:
        result.to_json_file(str(temporary), indent=2)
    return file


def keep_result(written: Path, evaluated: EvaluatedSAE, output: Path) -> Path:
    """Copy the JSON that SAEBench itself wrote, whole or not at all."""
    file = result_file(output, evaluated)
    with file_written_atomically(file) as temporary:
        shutil.copyfile(written, temporary)
    return file


def reported_counts(results: type[Any], pattern: str = r"sae_top_(\d+)_test_accuracy") -> list[int]:
    """The numbers of latents that a class of SAEBench's results has fields for."""
    matches = [re.fullmatch(pattern, item.name) for item in dataclasses.fields(results)]
    return [int(match.group(1)) for match in matches if match is not None]
