"""Publishing to a Hub on the loopback interface, through huggingface_hub's own client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_process import REPO, done, hub_environment, refused
from safetensors.torch import load_file, save_file

FOLDER = "tiny-model/blocks.1.hook_resid_post/96_l0-5_seed7"
COMMIT = r"/api/models/ada/tiny-saes/commit/"


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)


WITHOUT_PLUGIN = """
import sys, torch
from safetensors.torch import load_file, save_file
namespace = {"activations": load_file(sys.argv[2])["activations"]}
with torch.no_grad():
    exec(sys.argv[1], namespace)
save_file({"latents": namespace["latents"].contiguous()}, sys.argv[3])
print("msae_plugin" in sys.modules, type(namespace["sae"]).__name__)
"""


def test_the_whole_way_from_training_to_others_who_load_it(hub, worker, run, evaluate, tmp_path):
    sae = run / "multiscale"
    evaluation = evaluate(sae / "sae")
    value = done(worker.run("publish", run=sae, repo=REPO, evaluation=evaluation))
    assert value["folders"] == [FOLDER]
    assert hub.count("POST", COMMIT) == 1
    head = hub.repos[REPO].head()
    assert value["commit"] == head.oid
    assert value["files"] == {
        path: len(blob.content) for path, blob in head.files.items() if path != ".gitattributes"
    }
    assert hub.repos[REPO].private is False

    # The same bytes where nothing has to be removed.
    files = hub.files(REPO)
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert files[f"{FOLDER}/{name}"] == (sae / "sae" / name).read_bytes()
    jumprelu = (sae / "jumprelu" / "sae_weights.safetensors").read_bytes()
    assert files[f"{FOLDER}/jumprelu/sae_weights.safetensors"] == jumprelu
    for name in ("metrics.jsonl", "export.json"):
        assert files[f"{FOLDER}/{name}"] == (sae / name).read_bytes()
    saebench = "core/seed_42/multiscale_eval_results.json"
    assert files[f"{FOLDER}/{saebench}"] == (evaluation / saebench).read_bytes()
    assert sorted(path for path in files if "summary" in path) == [f"{FOLDER}/summary.json"]

    # Nothing of this machine.
    local = json.loads((sae / "sae" / "cfg.json").read_text())["metadata"]
    assert Path(local["model_name"]).is_absolute()
    for path, content in files.items():
        if not path.endswith(".safetensors"):
            assert b"/tmp/" not in content, path
            assert b"/data/" not in content, path
            assert str(Path.home()).encode() + b"/" not in content, path
    config = json.loads(files[f"{FOLDER}/cfg.json"])
    assert config["metadata"]["model_name"] == "tiny-model"
    assert config["metadata"]["dataset_path"] == "notes.jsonl"

    # The card's snippets: one where the plugin is at hand, one in a fresh process without it.
    with_plugin, without = python_blocks(files["README.md"].decode())
    activations = str(tmp_path / "activations")
    save_file({"activations": 3 * torch.randn(64, 64)}, activations)
    fresh = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, without, activations, str(tmp_path / "jumprelu")],
        env=hub_environment(hub, tmp_path / "home of somebody else"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert fresh.stdout.split() == ["False", "JumpReLUSAE"]
    native = worker.run(
        "snippet", snippet=with_plugin, activations=activations, results=str(tmp_path / "native")
    )
    assert done(native) == ["MultiScaleSAE"]
    latents, copied = (load_file(tmp_path / name)["latents"] for name in ("native", "jumprelu"))
    assert (latents > 0).sum() > 64
    torch.testing.assert_close(latents, copied)


def test_what_is_said_after_publishing(hub, worker, run):
    outcome = worker.run("publish", run=run / "multiscale", repo=REPO)
    value = done(outcome)
    assert outcome.asked == []
    assert value["commit"][:12] in outcome.said[-1]
    check = value["verifications"][0]
    assert check["activations"] == "256 real activations of the run"
    assert check["files"] == len(value["files"]) - 1
    assert check["agreement"]["active"] > 256
    assert check["jumprelu_agreement"]["max_latent_difference"] < 1e-5
    assert any("not evaluated" in note for note in value["notes"])
    report = "\n".join(value["report"])
    assert "loads main alone" not in report
    assert f"commit {value['commit']} on main: {hub.endpoint}/{REPO}/commit/" in report
    assert f"{FOLDER}/jumprelu/sae_weights.safetensors" in report
    assert "latents are equal on 256 real activations of the run, the JumpReLU copy too" in report
    assert value["stanza"] in report
    assert "msae export, --to neuronpedia" in report


def test_all_saes_of_a_run_go_into_one_commit(hub, worker, run, evaluate):
    evaluation = evaluate(run / "multiscale" / "sae", run / "batchtopk" / "sae")
    value = done(worker.run("publish", run=run, repo=REPO, evaluation=evaluation))
    assert len(set(value["folders"])) == 2
    assert hub.count("POST", COMMIT) == 1
    files = hub.files(REPO)
    card = files["README.md"].decode()
    for folder, name in zip(value["folders"], ("multiscale", "batchtopk"), strict=True):
        weights = (run / name / "sae" / "sae_weights.safetensors").read_bytes()
        assert files[f"{folder}/sae_weights.safetensors"] == weights
        assert f"| `{folder}` | {name} |" in card
        # Only its own rows.
        summary = json.loads(files[f"{folder}/summary.json"])
        assert list(summary["saes"]) == [name]
        assert summary["saes"][name]["reference"] == f"{REPO}:{folder}"
        assert {row["sae"] for row in summary["results"]} == {name}
    figures = [path for path in files if path.endswith(".png")]
    assert figures == [f"{value['folders'][0]}/figures/comparison.png"]
    assert files[figures[0]] == (run / "comparison.png").read_bytes()
    assert card.count(f"![comparison]({figures[0]})") == 1
    listed = yaml.safe_load(value["stanza"])["ada-tiny-saes"]["saes"]
    assert [sae["path"] for sae in listed] == sorted(
        [f"{value['folders'][0]}/jumprelu", value["folders"][1]]
    )


def test_the_figures_of_a_report(hub, worker, run, tmp_path):
    options = {"run": run / "batchtopk", "repo": REPO, "report": tmp_path / "report"}
    refused(worker.run("publish", **options), "InputError", "--report", "msae report")
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "report" / "figures" / "front.png").write_bytes(b"\x89PNG front")
    (folder,) = done(worker.run("publish", **options))["folders"]
    assert hub.files(REPO)[f"{folder}/figures/front.png"] == b"\x89PNG front"


def test_saes_of_one_run_whose_names_would_collide_stay_apart(hub, worker, run):
    shutil.rmtree(run / "batchtopk")
    shutil.copytree(run / "multiscale", run / "batchtopk")
    value = done(worker.run("publish", run=run, repo=REPO))
    assert value["folders"] == [f"{FOLDER}_multiscale", f"{FOLDER}_batchtopk"]


def test_adding_one_later_keeps_the_others_and_what_the_user_wrote(hub, worker, run, evaluate):
    foreign = {
        # As SAELens' own uploader leaves it: no summary, no runner_cfg.json.
        "old/sae/cfg.json": (run / "batchtopk" / "sae" / "cfg.json").read_bytes(),
        "old/sae/sae_weights.safetensors": b"weights",
        "notes.txt": b"mine",
        "README.md": b"---\nlicense: apache-2.0\ntags:\n- mine\nfunding: none\n---\n\n"
        b"# Mine\n\nBefore.\n",
    }
    hub.make(REPO, foreign)
    first = evaluate(run / "multiscale" / "sae")
    done(worker.run("publish", run=run / "multiscale", repo=REPO, evaluation=first))
    once = hub.files(REPO)["README.md"].decode() + "\nAfter, by hand.\n"
    head = hub.repos[REPO].head()
    head.files["README.md"].content = once.encode()
    hub.repos[REPO].branches["main"] = hub.repos[REPO].add(head.oid, "by hand", head.files)
    second = done(worker.run("publish", run=run / "batchtopk", repo=REPO, folder="b/topk"))
    files = hub.files(REPO)
    for path, content in foreign.items():
        if path != "README.md":
            assert files[path] == content
    assert files[f"{FOLDER}/summary.json"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\ntags:\n- mine\n")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["funding"] == "none"
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "saelens"
    assert "\n# Mine\n\nBefore.\n" in card
    assert card.endswith("\nAfter, by hand.\n")
    table = card.split("## SAEs")[1].split("## Load")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == ["b/topk", "old/sae", FOLDER]
    # The numbers of the SAE that was there before are still in the table of metrics.
    label = FOLDER.rsplit("/", maxsplit=1)[-1]
    assert f"| `{label}` | 6.010 ± 0.601 | 0.910 ± 0.091 | 42, 43, 44 |" in card
    assert "Not evaluated, so there are no numbers: `topk`, `sae`." in card
    assert second["removed"] == []


def test_a_folder_that_exists_is_replaced_only_after_a_yes(hub, worker, run, evaluate):
    sae = run / "multiscale"
    done(worker.run("publish", run=sae, repo=REPO, evaluation=evaluate(sae / "sae")))
    before = hub.repos[REPO].head()
    (sae / "metrics.jsonl").write_text('{"step": 1}\n')

    nobody_to_ask = worker.run("publish", run=sae, repo=REPO)
    refused(nobody_to_ask, "InputError", FOLDER, "--overwrite", "nothing was published")
    no = worker.run("publish", run=sae, repo=REPO, answer=False)
    refused(no, "InputError", "nothing was published")
    assert no.asked == [f"{REPO} has {FOLDER} already (10 files). Replace it?"]
    assert hub.repos[REPO].head() == before

    yes = worker.run("publish", run=sae, repo=REPO, answer=True)
    value = done(yes)
    # Without an evaluation this time: the old one, of what may be other weights, goes.
    gone = {f"{FOLDER}/summary.json", f"{FOLDER}/core/seed_42/multiscale_eval_results.json"}
    assert set(value["removed"]) == gone
    assert not gone & hub.files(REPO).keys()
    assert hub.files(REPO)[f"{FOLDER}/metrics.jsonl"] == b'{"step": 1}\n'
    assert "model-index" not in hub.files(REPO)["README.md"].decode()

    silent = worker.run("publish", run=sae, repo=REPO, overwrite=True)
    assert silent.asked == []
    assert done(silent)["commit"] == hub.repos[REPO].head().oid


def test_a_dry_run_renders_exactly_what_is_uploaded_and_uploads_nothing(
    hub, worker, run, evaluate, tmp_path
):
    hub.make(REPO, {"README.md": b"# Here already\n", "x.txt": b"x"})
    options = {"run": run, "repo": REPO, "evaluation": evaluate(*run.glob("*/sae"))}
    rendered = tmp_path / "rendered"
    value = done(worker.run("publish", dry_run=True, output=rendered, token=None, **options))
    assert value["output"] == str(rendered)
    assert f"rendered in {rendered}; nothing was uploaded" in value["report"]
    assert value["commit"] is None
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    on_disk = {
        path.relative_to(rendered).as_posix(): path.read_bytes()
        for path in rendered.rglob("*")
        if path.is_file()
    }
    assert value["files"] == {path: len(content) for path, content in on_disk.items()}
    done(worker.run("publish", **options))
    on_hub = hub.files(REPO)
    assert {path: on_hub[path] for path in on_disk} == on_disk
    assert on_hub.keys() - on_disk.keys() == {".gitattributes", "x.txt"}
    again = worker.run("publish", dry_run=True, output=rendered, **options)
    refused(again, "InputError", "not empty")


@pytest.mark.parametrize("recorded_in", ["export.json", "metrics.jsonl"])
def test_an_sae_worse_than_the_mean_is_published_only_on_demand(hub, worker, run, recorded_in):
    """Exports of older versions have the number in their log alone."""
    sae = run / "multiscale"
    export = json.loads((sae / "export.json").read_text())
    assert export.pop("explained_variance") is not None
    if recorded_in == "export.json":
        export["explained_variance"] = -6.0
    else:
        rows = [json.loads(line) for line in (sae / "metrics.jsonl").read_text().splitlines()]
        rows[-1]["explained_variance"] = -6.0
        (sae / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (sae / "export.json").write_text(json.dumps(export))
    outcome = worker.run("publish", run=sae, repo=REPO)
    refused(outcome, "InputError", "'multiscale'", "of -6,", "--allow-negative-variance")
    assert hub.repos == {}
    done(worker.run("publish", run=sae, repo=REPO, allow_negative_variance=True))
    assert REPO in hub.repos


def test_a_dry_run_needs_no_hub(hub, worker, run, tmp_path):
    hub.fail("GET", "", "drop", times=1)
    value = done(
        worker.run("publish", run=run / "batchtopk", repo=REPO, dry_run=True, output=tmp_path / "r")
    )
    assert "Hub was not reached" in value["notes"][0]
    assert (tmp_path / "r" / "README.md").is_file()


def test_private(hub, worker, run):
    done(worker.run("publish", run=run / "batchtopk", repo=REPO, private=True))
    assert hub.repos[REPO].private is True
    hub.make("ada/public")
    outcome = worker.run("publish", run=run / "batchtopk", repo="ada/public", private=True)
    refused(outcome, "InputError", "is public")
    assert hub.count("POST", "/api/models/ada/public/commit/") == 0


def test_a_branch_a_tag_and_a_pull_request(hub, worker, run):
    hub.make(REPO, {"README.md": b"# Here\n"})
    main = hub.repos[REPO].head().oid
    sae = run / "multiscale"
    value = done(worker.run("publish", run=sae, repo=REPO, revision="try", tag="v1"))
    repo = hub.repos[REPO]
    assert repo.branches["main"] == main
    assert repo.branches["try"] == repo.tags["v1"] == value["commit"]
    assert repo.commits[value["commit"]].parent == main
    assert value["verifications"][0]["jumprelu_agreement"]["active"] > 0
    assert f"msae download {REPO}@{value['commit']}:FOLDER" in "\n".join(value["report"])

    taken = worker.run("publish", run=sae, repo=REPO, folder="b", tag="v1")
    refused(taken, "InputError", "has a tag 'v1' already")

    value = done(worker.run("publish", run=sae, repo=REPO, pr=True))
    assert value["pull_request"].endswith("/discussions/1")
    assert repo.branches["main"] == main
    assert repo.pull_requests[1] == value["commit"]
    for options in ({"pr": True, "tag": "v2"}, {"pr": True, "revision": "try"}):
        refused(worker.run("publish", run=sae, repo=REPO, **options), "InputError", "--pr")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, ["hf auth login", "HF_TOKEN"]),
        ("hf_revoked", ["not valid", "hf auth login"]),
        ("hf_ben_reads", ["may not do this", "rights to write under ada"]),
    ],
)
def test_without_permission_nothing_is_published(hub, worker, run, token, words):
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO, token=token)
    refused(outcome, "InputError", *words)
    assert hub.repos == {}


def test_what_a_public_repository_would_tell_is_asked(hub, worker, run, evaluate):
    evaluation = evaluate(run / "multiscale" / "sae")
    saebench = evaluation / "core/seed_42/multiscale_eval_results.json"
    saebench.write_text('{"model_name": "/mnt/jane/models/tiny"}')
    options = {"run": run / "multiscale", "repo": REPO, "evaluation": evaluation}
    outcome = worker.run("publish", **options)
    refused(outcome, "InputError", "/mnt/jane/models/tiny", "nothing was published")
    assert hub.repos == {}
    outcome = worker.run("publish", answer=True, **options)
    assert any("/mnt/jane" in note for note in done(outcome)["notes"])
    assert "/mnt/jane" in outcome.asked[0]
    assert done(worker.run("publish", private=True, **options | {"repo": "ada/hidden"}))["notes"]


def test_an_export_of_another_host_without_activations(hub, worker, run, tmp_path):
    plain = shutil.copytree(run / "batchtopk" / "sae", tmp_path / "plain")
    value = done(worker.run("publish", run=plain, repo=REPO))
    assert "made-up activations" in value["verifications"][0]["activations"]
    assert value["verifications"][0]["agreement"]["active"] > 0
