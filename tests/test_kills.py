"""Runs that are killed at random moments, again and again, end as if nothing had happened.

The processes are forks of this one, which has imported the libraries and loaded the model.
"""

import copy
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcome import outcome

from msae_plugin.common.interruption import InterruptedBySignalError
from msae_plugin.comparison.compare import compare
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.data.text import TextData, load_text
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training import passes
from msae_plugin.training.passes import make_cache
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner, is_complete

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HOOK = "blocks.1.hook_resid_post"
MSAE = {
    "preset": "default",
    "d_sae": 96,
    "k": 8,
    "orthogonality_chunk_size": 16,
    "revival_every": 4,
    "revival_dead_steps": 2,
}
STANDARD = {"architecture": "standard", "d_sae": 64, "l1_coefficient": 0.1}
# Checkpoints at fixed steps, and by the clock at others in every run.
TRAINING = {
    "tokens": 30 * 128,
    "batch_size_tokens": 128,
    "lr": 1e-3,
    "n_batches_in_buffer": 16,
    "store_batch_size_prompts": 8,
    "calibrate_batches": 4,
    "dead_feature_window": 10,
    "n_checkpoints": 4,
    "checkpoint_minutes": 0.003,
}

Command = Callable[[Path], object]


@pytest.fixture
def common(tiny_corpus: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(tiny_corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": [HOOK],
        "training": TRAINING,
    }


@pytest.fixture
def text(tiny_corpus: Path) -> TextData:
    return load_text(str(tiny_corpus), heldout_documents=20)


@pytest.fixture
def commands(
    common: dict[str, Any],
    text: TextData,
    tiny_language_model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Command]:
    monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", 0.05)
    logging = {"logging": {"every_steps": 7, "tensorboard": "off"}}

    def train(output: Path, **changes: Any) -> None:
        config = RunConfig.from_dict(copy.deepcopy({**common, **logging, **changes}))
        if is_complete(output, config):
            return
        given = {} if "cached_activations" in changes else {"text": text}
        given |= {"language_model": tiny_language_model} if given else {}
        MultiScaleRunner(config, output, resume="auto", **given).run()

    def cache(output: Path) -> None:
        if not (output / "cache.json").exists():
            config = RunConfig.from_dict(copy.deepcopy({**common, "sae": STANDARD}))
            make_cache(config, output, language_model=tiny_language_model, text=text)

    def from_cache(output: Path) -> None:
        cache(tmp_path / "cache")
        train(output, sae=MSAE, cached_activations=str(tmp_path / "cache"))

    def comparison(output: Path) -> None:
        set_elsewhere = {"k", "l1_coefficient"}
        methods = {
            name: {key: value for key, value in sae.items() if key not in set_elsewhere}
            for name, sae in {"m": MSAE, "s": STANDARD}.items()
        }
        values = {
            **common,
            "l0": [6],
            "seeds": [0],
            "saes": methods,
            "search": {"tokens": 640, "max_trials": 2, "corrections": 1},
            "heldout": {"tokens": 512, "loss_tokens": 256, "contexts": 1},
            "log_every_steps": 7,
        }
        config = CompareConfig.from_dict(copy.deepcopy(values))
        compare(config, output, language_model=tiny_language_model)

    return {
        "one": lambda output: train(output, sae=MSAE),
        "several": lambda output: train(output, saes={"m": MSAE, "s": STANDARD}),
        "from_cache": from_cache,
        "cache": cache,
        "compare": comparison,
    }


def start(command: Command, output: Path) -> int:
    # A signal may come before the fork's first line: it waits until the fork can answer it.
    waiting = {signal.SIGINT, signal.SIGTERM}
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
        os.close(log)
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
        command(output)
        status = 0
    except InterruptedBySignalError as interruption:
        status = interruption.exit_status
    except KeyboardInterrupt:
        status = 130
    except BaseException as failure:  # noqa: BLE001 - a fork ends here, whatever happened
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)  # noqa: T201
    finally:
        sys.stderr.flush()
        os._exit(status)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_continued(
    command: Command, output: Path, seconds: float, kills: int, chance: random.Random
) -> int:
    """Start and kill a command; then let it end. How many of the kills hit it while it ran."""
    for hit in range(kills + 1):
        child, number = start(command, output), chance.choice(SIGNALS)
        if hit < kills:
            # What is continued is shorter than the whole, and a longer sleep would miss its end.
            time.sleep(chance.uniform(0, 0.6 * seconds))
            os.kill(child, number)
        status = end(child)
        if status == 0:
            return hit
        told = output.with_suffix(".log").read_text()
        assert status in (-number, 128 + number), told
    raise AssertionError(told)


SLOW = {"one": 30, "several": 25, "from_cache": 25, "cache": 10, "compare": 12}


@pytest.mark.promise(
    "Resuming is exact: a run that is stopped at any moment and resumed ends with the "
    "bits of the uninterrupted one."
)
@pytest.mark.parametrize(
    ("case", "kills"),
    [
        *((case, 1) for case in SLOW),
        *(pytest.param(case, kills, marks=pytest.mark.slow) for case, kills in SLOW.items()),
    ],
)
def test_killed_at_random_moments_nothing_is_lost(
    commands: dict[str, Command], tmp_path: Path, case: str, kills: int
) -> None:
    command, whole = commands[case], tmp_path / "whole"
    if case == "from_cache":
        commands["cache"](tmp_path / "cache")
    started = time.monotonic()
    assert end(start(command, whole)) == 0, whole.with_suffix(".log").read_text()
    seconds = time.monotonic() - started
    expected = outcome(whole)
    chance, hits, rounds = random.Random(f"{case} {kills}"), 0, 0
    while hits < kills:
        output, rounds = tmp_path / str(rounds), rounds + 1
        hits += killed_and_continued(command, output, seconds, min(5, kills - hits), chance)
        assert outcome(output) == expected
        leftovers = [p for p in output.rglob(".*") if p.name.startswith((".incomplete", ".claim"))]
        assert not leftovers
        shutil.rmtree(output)
    print(f"{case}: {hits} interruptions in {rounds} runs, lost: 0")  # noqa: T201
