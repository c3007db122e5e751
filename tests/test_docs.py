"""What the documentation prints can be typed: Python blocks run, commands parse, recipes exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from msae_cli import app as cli
from msae_plugin.common.recipes import SHIPPED, command_of, read_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TINY_TRUTH = {
    "num_features": 48,
    "hidden_dim": 16,
    "seed": 3,
    "firing_probability": {"generator_name": "zipfian", "max_prob": 0.3, "min_prob": 0.01},
    "mean_firing_magnitudes": 4.0,
    "std_firing_magnitudes": 0.5,
}
# Command lines that are others'.
OTHERS = {"saebench", "saelens"}


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        return ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    blocks = re.findall(r"(<!-- not run.*?-->\n)?```python\n(.*?)```", text, flags=re.DOTALL)
    return [code for not_run, code in blocks if not not_run]


@pytest.fixture
def small_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tiny_texts: list[str]
) -> None:
    """Files with the names of shipped recipes, which come first: tiny ones, in their place."""
    monkeypatch.chdir(tmp_path)
    recipe: dict[str, Any] = yaml.safe_load(recipe_file.read_text())
    recipe["training"]["lr"] = 1e-2
    sae = recipe.pop("sae")
    recipe["saes"] = {
        "multiscale": sae,
        "batchtopk": {"architecture": "batchtopk", "d_sae": 96, "k": 8},
    }
    ground_truth = yaml.safe_load((SHIPPED / "compare_ground_truth.yaml").read_text())
    ground_truth["quick"] = {
        "synthetic.model": TINY_TRUTH,
        "synthetic.eval_samples": 2000,
        "common.d_sae": 24,
        "l0": [3],
        "seeds": [1],
        "training.tokens": 5120,
        "training.batch_size_tokens": 128,
        "training.lr_warm_up_steps": 4,
        "training.lr_decay_steps": 8,
    }
    core = {
        "dataset": str(recipe["data"]["source"]),
        "context_size": 32,
        "batch_size_prompts": 2,
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 2,
    }
    for name, values in (
        ("smollm2", recipe),
        ("compare_ground_truth", ground_truth),
        ("offline", {"evaluations": {"core": core}}),
    ):
        Path(name).write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/python.md", "docs/tasks.md", "examples/first_sae.ipynb"]
)
def test_the_python_of_a_page_runs_as_printed(
    page: str, small_stand_ins: None, tiny_model_dir: Path
) -> None:
    blocks = python_blocks(page)
    assert blocks
    # They leave two evaluations of `offline` out.
    if page in ("docs/tasks.md", "examples/first_sae.ipynb"):
        protocol = yaml.safe_load(Path("offline").read_text())
        protocol["evaluations"] |= {"sparse_probing": {}, "sparse_probing_sae_probes": {}}
        Path("offline").write_text(yaml.safe_dump(protocol))
    # The tiny model has three layers.
    for pattern, replacement in (
        (r"\b(100|60)_000\b", "6_400"),
        (r"blocks\.5\b", "blocks.0"),
        (r"blocks\.9\b", "blocks.1"),
        ("packaged:smollm2-135m", str(tiny_model_dir)),
    ):
        blocks = [re.sub(pattern, replacement, block) for block in blocks]
    code = "\n".join(blocks)
    exec(compile(code, page, "exec"), {})


WRITTEN_BY_READERS = {
    "X.yaml", "mine.yaml", "methods.yaml", "with_mine.yaml", "runs/rates/tuned.yaml"
}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^(?: {4})?(msae [a-z].*)$", text, flags=re.MULTILINE)
        found += [(page.relative_to(ROOT).as_posix(), line) for line in lines]
    return found


def test_every_command_of_the_pages_can_be_typed() -> None:
    group = typer.main.get_command(cli.app)
    seen = 0
    for page, line in commands():
        words = cli.joined_seeds(shlex.split(line, comments=True)[1:])
        if "..." in line or words[0] in OTHERS:
            continue
        command = group.commands.get(words[0])  # type: ignore[attr-defined]
        assert command is not None, (page, line)
        command.make_context(words[0], [word for word in words[1:] if word != "--quiet"])
        if "--config" in words:
            name = words[words.index("--config") + 1]
            of = {"cache": "train", "info": "train", "tune": "compare", "sweep": "compare"}
            if name not in WRITTEN_BY_READERS:
                recipe = read_yaml(SHIPPED / f"{name}.yaml")
                assert command_of(recipe) == of.get(words[0], words[0]), (page, line)
        seen += 1
    assert seen > 20


def headings(page: Path) -> set[str]:
    """Ids that a page's headings get on GitHub and in the site."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere() -> None:
    seen = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
            file, _, heading = target.partition("#")
            if "://" in target:
                continue
            found = page.parent / file if file else page
            assert found.exists(), (page.name, target)
            assert not heading or heading in headings(found), (page.name, target)
            seen += 1
    assert seen > 50
