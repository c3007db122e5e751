"""The cases that are frozen, in the order in which they need each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clock import without_numbers
from inputs import RARE_SETTINGS

if TYPE_CHECKING:
    from freeze import Workplace

Case = Callable[["Workplace", str], None]
CASES: dict[str, Case] = {}
COMMANDS = (
    "train", "info", "eval", "saebench", "demo", "cache",
    "compare", "tune", "sweep", "report", "publish", "download",
)  # fmt: skip
PRESETS = ("nested", "source-run-4", "source-run-8", "source-plan")


def case(function: Case) -> Case:
    """Add a case under the name of its function."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def train(work: "Workplace", recipe: str, output: str, *words: str) -> dict[str, Any]:
    """`msae train` into a folder beside the inputs."""
    return work.run("train", "-c", recipe, "-o", work.folder / output, *words)


@case
def helps(work: "Workplace", name: str) -> None:
    commands = [work.run("--help")] + [work.run(command, "--help") for command in COMMANDS]
    work.record(name, commands)


@case
def default(work: "Workplace", name: str) -> None:
    ran = train(work, "train.yaml", "run", "--set", "training.n_checkpoints=2",
                "--set", "training.keep_checkpoints=9")  # fmt: skip
    work.record(name, [ran], "run")


@case
def presets(work: "Workplace", name: str) -> None:
    ran = [
        train(work, "train.yaml", f"presets/{preset}", "--set", f"sae.preset={preset}")
        for preset in PRESETS
    ]
    work.record(name, ran, "presets")


@case
def beside(work: "Workplace", name: str) -> None:
    work.record(name, [train(work, "beside.yaml", "beside")], "beside")


@case
def mechanisms(work: "Workplace", name: str) -> None:
    work.record(name, [train(work, "mechanisms.yaml", "mechanisms")], "mechanisms")


@case
def rare_settings(work: "Workplace", name: str) -> None:
    ran: list[dict[str, Any]] = []
    for setting, keys in RARE_SETTINGS.items():
        words = _changes([f"sae.{key}={json.dumps(value)}" for key, value in keys.items()])
        ran.append(train(work, "train.yaml", f"rare/{setting}", *words))
    work.record(name, ran, "rare")


@case
def training_options(work: "Workplace", name: str) -> None:
    variants = {
        "hooks": ["hooks=[blocks.0.hook_resid_post, blocks.1.hook_mlp_out]", "sae.d_in=64"],
        "hook-z": ["hooks=[blocks.1.attn.hook_z]"],
        "schedule": [
            "training.lr_scheduler=cosineannealing",
            "training.lr_warm_up_steps=3",
            "training.lr_decay_steps=4",
            "training.accumulation_steps=2",
            "training.weight_decay=0.01",
            "training.clip_grad_norm=null",
            "training.autocast=true",
        ],
        "text": [
            "data.source=notes.txt",
            "data.exclude_special_tokens=[0, 17]",
            "data.prepend_bos=false",
            "sae.dtype=bfloat16",
        ],
    }
    ran = [
        train(work, "train.yaml", f"options/{variant}", *_changes(changes))
        for variant, changes in variants.items()
    ]
    work.record(name, ran, "options")


def _changes(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@case
def cached(work: "Workplace", name: str) -> None:
    store = work.folder / "activations"
    change = ("--set", f"cached_activations={store}")
    ran = [
        work.run("cache", "-c", "train.yaml", "-o", store),
        train(work, "train.yaml", "cached", *change),
        work.run("cache", "-c", "train.yaml", "-o", store),
        train(work, "train.yaml", "cached2", *change, "--set", "data.context_size=16"),
        train(work, "train.yaml", "cached3", *change, "--set", "training.tokens=99999"),
    ]
    work.record(name, ran, "cached", "activations")


@case
def resume(work: "Workplace", name: str) -> None:
    """What a kill after the first checkpoint leaves, then the same command with `--resume`."""
    ran: list[dict[str, Any]] = []
    for how in ("auto", "folder"):
        killed = work.folder / "resumed" / how
        shutil.copytree(work.folder / "run", killed)
        for part in ("sae", "jumprelu"):
            shutil.rmtree(killed / part)
        for left in ("check_activations.safetensors", "export.json"):
            (killed / left).unlink()
        record = json.loads((killed / "run.json").read_text())
        (killed / "run.json").write_text(json.dumps({**record, "status": "running"}))
        first, *later = sorted(
            (path for path in (killed / "checkpoints").iterdir() if path.name.isdigit()),
            key=lambda path: int(path.name),
        )
        for path in later:
            shutil.rmtree(path)
        where = "auto" if how == "auto" else str(first)
        ran.append(
            train(work, "train.yaml", f"resumed/{how}", "--resume", where,
                  "--set", "training.n_checkpoints=2", "--set", "training.keep_checkpoints=9")
        )  # fmt: skip
    ran.append(train(work, "train.yaml", "run", "--resume", "auto", "--set", "sae.k=9"))
    work.record(name, ran, "resumed")


@case
def interrupted(work: "Workplace", name: str) -> None:
    """A run that Ctrl-C stops after some step, then goes on: which step is not in our hand."""
    words = ("--set", "training.tokens=19200", "--set", "training.n_checkpoints=50")
    output = work.folder / "interrupted"
    command = ("train", "-c", "train.yaml", "-o", output, *words)
    stopped = work.run(*command, stop_when=lambda: any((output / "checkpoints").glob("[0-9]*")))
    ran = [stopped, work.run(*command, "--resume", "auto")]
    folders = ("interrupted/sae", "interrupted/jumprelu")
    work.record(name, [without_numbers(one) for one in ran], *folders, names_only=True)


@case
def ground_truth(work: "Workplace", name: str) -> None:
    output = work.folder / "ground-truth"
    command = ("compare", "-c", "ground-truth.yaml", "--quick", "-o", output)
    ran = [
        work.run(*command, "--part", "1/2"),
        work.run(*command),
        work.run(
            *command,
            "--no-page",
            *_changes(["seeds=[0, 1, 2]", "saes={topk: {architecture: topk}}", "reference=null"]),
        ),
    ]
    work.record(name, ran, "ground-truth")


@case
def ladder(work: "Workplace", name: str) -> None:
    output = work.folder / "ladder"
    words = _changes(["saes={}", "reference=null", "seeds=[0]", "training.tokens=2560",
                      "ladder={groups: [cumulative, alone, default]}"])  # fmt: skip
    ran = work.run("compare", "-c", "ground-truth.yaml", "--quick", "-o", output, *words)
    work.record(name, [ran], "ladder/report", "ladder/comparison.json")


@case
def language_model(work: "Workplace", name: str) -> None:
    output = work.folder / "language-model"
    ran = work.run("compare", "-c", "language-model.yaml", "-o", output)
    work.record(name, [ran], "language-model")


@case
def tuning(work: "Workplace", name: str) -> None:
    output = work.folder / "tuning"
    words = ("--rates", "2e-3,4e-3", "--extend", "1", "--only", "default", "--only", "batchtopk")
    ran = work.run("tune", "-c", "ground-truth.yaml", "--quick", "-o", output, *words)
    work.record(name, [ran], "tuning")


@case
def evaluation(work: "Workplace", name: str) -> None:
    output = work.folder / "evaluation"
    beside = [str(work.folder / "beside" / sae) for sae in ("ours", "batchtopk")]
    copied = str(work.folder / "run" / "jumprelu")
    again = (*beside, copied, "-c", "protocol.yaml", "-o", output)
    ran = [
        work.run("eval", *beside, "-c", "protocol.yaml", "-o", output),
        work.run("eval", *again),
        work.run("eval", work.folder / "run", "-c", "smoke", "-o", work.folder / "smoke",
                 "--seeds", "3", "--set", "model.device=cpu"),
    ]  # fmt: skip
    work.record(name, ran, "evaluation", "smoke")


@case
def report(work: "Workplace", name: str) -> None:
    folders = ["run", "beside", "evaluation", "ground-truth", "language-model"]
    ran = work.run("report", *(work.folder / folder for folder in folders),
                   "-o", work.folder / "report")  # fmt: skip
    work.record(name, [ran], "report")


@case
def publishing(work: "Workplace", name: str) -> None:
    dry = ("--repo", "ada/tiny-saes", "--dry-run", "--output")
    ran = [
        work.run("publish", work.folder / "run", *dry, work.folder / "publish/run"),
        work.run("publish", work.folder / "beside", *dry, work.folder / "publish/beside",
                 "--evaluation", work.folder / "evaluation",
                 "--report", work.folder / "report", "--licence", "apache-2.0"),
        work.run("publish", work.folder / "beside/ours", *dry, work.folder / "publish/measured",
                 "--evaluation", work.folder / "evaluation",
                 "--report", work.folder / "report", "--licence", "apache-2.0"),
        work.run("publish", work.folder / "run/sae", *dry, work.folder / "publish/one",
                 "--folder", "mine/here"),
    ]  # fmt: skip
    work.record(name, ran, "publish")


@case
def info(work: "Workplace", name: str) -> None:
    run = work.folder / "run"
    checkpoints = sorted(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    folders = [run, run / "sae", run / "jumprelu", *checkpoints[:1]]
    folders += [
        work.folder / "beside",
        work.folder / "beside/standard",
        work.folder / "presets/source-plan",
    ]
    ran = [work.run("info", folder) for folder in folders]
    ran += [work.run("info", "-c", file) for file in ("train.yaml", "beside.yaml")]
    ran.append(work.run("info", "-c", "train.yaml", "--set", "sae.preset=source-run-9"))
    work.record(name, ran)


@case
def demo(work: "Workplace", name: str) -> None:
    """It measures whether bfloat16 is faster here: no two runs need have the same numbers."""
    output = work.folder / "demo"
    ran = work.run(
        "demo", "-o", output, "--model", "tiny-model", "--text", "notes.jsonl",
        "--hook", "blocks.1.hook_resid_post", "--tokens", "20480", "--d-sae", "96", "--k", "8",
        "--heldout-tokens", "1024", "--loss-tokens", "512", "--no-saebench",
    )  # fmt: skip
    ran["stdout"] = [line for line in ran["stdout"] if "«" not in line]
    work.record(name, [without_numbers(ran)], "demo", names_only=True)


@case
def refusals(work: "Workplace", name: str) -> None:
    ran: list[dict[str, Any]] = []
    out = work.folder / "refused"

    def refuse(*words: str | Path) -> None:
        ran.append(work.run(*words))
        # A refusal leaves nothing behind; what was no refusal says so here.
        ran[-1]["left"] = sorted(path.name for path in out.iterdir()) if out.exists() else []
        shutil.rmtree(out, ignore_errors=True)

    for change in TRAINING_REFUSALS:
        refuse("train", "-c", "train.yaml", "-o", out, "--set", change)
    for file in ("empty.yaml", "list.yaml", "broken.yaml", "nothing.yaml", "no/folder.yaml",
                 "empty-folder", "trian.yaml", "tiny-model/model.safetensors"):  # fmt: skip
        refuse("train", "-c", file, "-o", out)
        refuse("compare", "-c", file, "-o", out)
        refuse("eval", work.folder / "run", "-c", file, "-o", out)
    for change in COMPARISON_REFUSALS:
        refuse("compare", "-c", "ground-truth.yaml", "-o", out, "--set", change)
    for change in PROTOCOL_REFUSALS:
        refuse("eval", work.folder / "run", "-c", "protocol.yaml", "-o", out, "--set", change)
    run, inputs = work.folder / "run", work.inputs
    for words in (
        ("train", "-c", "train.yaml", "-o", "full-folder"),
        ("train", "-c", "train.yaml", "-o", "train.yaml"),
        ("train", "-c", "train.yaml", "-o", out, "--resume", "full-folder"),
        ("train", "-c", "train.yaml", "-o", out, "--resume", "nowhere"),
        ("train",),
        ("trian",),
        ("info",),
        ("info", "full-folder"),
        ("info", "empty-folder"),
        ("info", "nowhere"),
        ("info", "tiny-model"),
        ("info", run, "--set", "a=1"),
        ("info", "-c", "examples/pythia-160m.yaml"),
        ("eval", "nowhere", "-c", "protocol.yaml", "-o", out),
        ("eval", "./nowhere", "-c", "protocol.yaml", "-o", out),
        ("eval", "full-folder", "-c", "protocol.yaml", "-o", out),
        ("eval", "nobody/nothing:folder", "-c", "protocol.yaml", "-o", out),
        ("eval", run, "-c", "smok", "-o", out),
        ("eval", run, "-c", "protocol.yaml", "-o", out, "--seeds", "x"),
        ("eval", run, "-c", "protocol.yaml", "-o", out, "--hook", "blocks.9.hook_resid_post"),
        ("eval", run, "-c", "protocol.yaml", "-o", out, "--model", "google/gemma-2-2b"),
        ("eval", run, "-c", "protocol.yaml", "-o", "full-folder"),
        ("saebench", "nonsense"),
        ("demo", "-o", "full-folder"),
        ("cache", "-c", "train.yaml", "-o", "full-folder"),
        ("compare", "-c", "ground-truth.yaml", "-o", "full-folder"),
        ("compare", "-c", "ground-truth.yaml", "-o", out, "--part", "2"),
        ("compare", "-c", "ground-truth.yaml", "-o", out, "--part", "3/2"),
        ("compare", "-c", "language-model.yaml", "-o", out, "--quick"),
        ("tune", "-c", "ground-truth.yaml", "-o", out, "--rates", "a"),
        ("tune", "-c", "ground-truth.yaml", "-o", out, "--only", "nobody"),
        (
            "tune",
            "-c",
            "ground-truth.yaml",
            "--quick",
            "-o",
            out,
            "--metric",
            "nothing",
            "--only",
            "topk",
            "--rates",
            "4e-3",
        ),
        ("tune", "-c", "ground-truth.yaml", "-o", out, "--seed", "1"),
        ("sweep", "-c", "ground-truth.yaml", "-o", out, "--job", "x"),
        ("sweep", "-c", "ground-truth.yaml", "-o", out, "--jobs", "0"),
        ("report", "nowhere", "-o", out),
        ("report", "full-folder", "-o", out),
        ("publish", "nowhere", "--repo", "a/b", "--dry-run"),
        ("publish", "full-folder", "--repo", "a/b", "--dry-run"),
        ("publish", inputs / "train.yaml", "--repo", "a/b", "--dry-run"),
        ("publish", run, "--repo", "nonsense", "--dry-run"),
        ("publish", run, "--repo", "a/b", "--dry-run", "--folder", "../x"),
        ("publish", run, "--repo", "a/b", "--dry-run", "--evaluation", "full-folder"),
        ("publish", run, "--repo", "a/b", "--dry-run", "--output", "full-folder"),
        ("publish", run / "checkpoints", "--repo", "a/b", "--dry-run"),
        ("publish", run, "--repo", "a/b"),
        ("download", "nonsense", "-o", out),
        ("download", "ada/tiny-saes", "-o", "full-folder"),
        ("download", "ada/tiny-saes", "-o", out),
    ):
        refuse(*words)
    work.record(name, ran)


TRAINING_REFUSALS = (
    "x", "=3", "sae.kk=3", "sae={", "training.tokens=3", "training.tokens=many", "training.lr=0",
    "training.lr=3e-4x", "training.lr=true", "training.seed=-1",
    "training.clip_grad_norm=0", "training.adam_beta1=1", "training.lr_scheduler=cosine",
    "training.lr_decay_steps=99", "training.lr_floor=1.0", "training.n_restart_cycles=99",
    "training.n_batches_in_buffer=1", "training.gradient_lr.factor=0", "training.gradient_lr=1",
    "training.activations_mixing_fraction=2", "training.compile=true", "trainig.lr=1",
    "model.name=nowhere/at-all", "model.name=packaged:smolm", "model.dtype=float8",
    "model.device=gpu", "model.device=cuda", "model.autocast=maybe", "data.source=nowhere.jsonl",
    "data.source=nobody/nothing", "data.context_size=1", "data.context_size=4096",
    "data.heldout_documents=1.5", 
    "data.exclude_special_tokens=bos", "hooks=[]", "hooks=blocks.1.hook_resid_post",
    "hooks=[blocks.7.hook_resid_post]", "hooks=[blocks.1.hook_resid]", "hooks=[nonsense]",
    "hooks=[blocks.1.hook_resid_post, blocks.1.hook_resid_post]", "sae=null", "sae.d_sae=null",
    "sae.d_sae=0", "sae.k=0", "sae.k=97", "sae.k=null", "sae.d_in=32", "sae.dtype=float16",
    "sae.device=cpu", "sae.metadata={}", "sae.reshape_activations=hook_z", "sae.lr=-1",
    "sae.lr_floor=-1", "sae.preset=source-run-11", "sae.preset=deflaut",
    "sae.architecture=multi_scale", "sae.architecture=nonsense",
    "sae={architecture: topk, preset: default, d_sae: 96}", "sae={architecture: topk, k: 8}",
    "sae.selection=topk", "sae.sparsity_scales=[0.5, 0.5]", "sae.sparsity_scales=2",
    "sae.prefix_fractions=[2]", "sae.firing_floor=2",
    "sae.orthogonality_pairs=all", "sae.orthogonality_coefficient=-1", "sae.sketch_rank=-1",
    "sae.orthogonality_weighting=coactivation", "sae.norm_scales=[0]", "sae.norm_attention=true",
    "sae.norm_eps=-1", "sae.skip_scale=nan", "sae.revival_every=-1", "sae.k_anneal_steps=-1",
    "sae.standardise=2", "sae.normalize_activations=layer_norm", "sae.decode_kernel=fast",
    "sae.cuda_graphs=1", "saes={a: {d_sae: 96, k: 8}}", "saes={}", "saes.a=null",
    "logging.every_steps=0", "logging.tensorboard=maybe", "logging.wandb.mode=nowhere",
    "cached_activations=full-folder", "cached_activations=3",
)  # fmt: skip

COMPARISON_REFUSALS = (
    "x", "sae={}", "saes={}", "saes.a={architecture: nonsense}", "saes.a={preset: nonsense}",
    "saes.a={peer: nonsense}", "saes.a={control: nonsense}", "saes.a={k: 3}",
    "saes.a={peer: c2r, preset: default}", "saes.a={control: permuted_decoder of nobody}",
    "saes.a={control: residual_stream}", "saes.a=3", "saes.a b={preset: default}", "l0=[]",
    "l0=[0]", "l0=[999]", "l0=[3, 3]", "seeds=[]", "seeds=[-1]", "seeds=[1, 1]",
    "reference=nobody", "search.tolerance=2", "search.max_trials=0", "search.corrections=-1",
    "synthetic.eval_samples=0", "synthetic.model.num_feature=3", "synthetic.model={}",
    "synthetic=null", "hooks=[blocks.1.hook_resid_post]", "evaluation=smoke", "common={}",
    "common.d_sae=many", "training.seed=x", "training.tokens=1", "ladder.groups=[nonsense]",
    "ladder={groups: [cumulative], leave_out: [nobody]}", "log_every_steps=0",
    "heldout.tokens=5", "model.name=tiny-model",
)  # fmt: skip

PROTOCOL_REFUSALS = (
    "x", "evaluations={}", "evaluations.nonsense={}", "evaluations.core.nothing=3",
    "evaluations.core.context_size=many", "evaluations.core.context_size=0",
    "evaluations.core.context_size=4096", "evaluations.core.dataset=nowhere.jsonl",
    "evaluations.core.dataset=nobody/nothing", "evaluations.core.batch_size_prompts=0",
    "evaluations.core.n_eval_sparsity_variance_batches=99999", "seeds=[]", "seeds=[-1]",
    "seeds=[1, 1]", "seeds=x", "model.dtype=float8", "model.device=gpu", "model.device=cuda",
    "model.nam=x", "hook=nonsense", "hook=blocks.7.hook_resid_post",
    "evaluations.sparse_probing.dataset_names=[fancyzhx/ag_news]",
    "evaluations.sparse_probing.dataset_names=[packaged:nothing]",
    "evaluations.sparse_probing.probe_train_set_size=999999",
    "evaluations.unlearning={}", "evaluations.autointerp={}", "evaluations.ravel={}",
    "datasets=3", "cache=train.yaml",
)  # fmt: skip
