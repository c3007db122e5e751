"""Shared fixtures: a random tiny Llama with a tokenizer of its own, and generated text.

Nothing here or in any test uses the network; the switches must be set before transformers,
datasets or huggingface_hub are imported.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
# One thread unless the environment says otherwise, here and in the processes that tests start: with
# several test processes on a small machine, two threads per process are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that spin while they wait take the time of those that work: with more of them than free
# cores, a file of one minute ran for more than ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import promises
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from msae_plugin.models.loading import LanguageModel, load_language_model

# CPython 3.13 has no sae-bench (pyproject.toml): what evaluates with it cannot be tested there.
collect_ignore_glob = [] if importlib.util.find_spec("sae_bench") else ["evaluation/*"]

# How fast a machine is decides no test.
settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

# A plugin may have imported torch before the variable was set.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A fork has none of its parent's threads: it would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

TINY_LAYERS = 3
TINY_D_MODEL = 64
TINY_VOCABULARY = 512


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files in a random order, and the tests of each file in a random order",
    )
    parser.addoption(
        "--record-promises",
        action="store_true",
        help="write down on which day tests of docs/promises.md passed",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_promises") and not hasattr(config, "workerinput"):
        if config.getoption("keyword"):
            raise pytest.UsageError("--record-promises records whole tests: leave -k out")
        config.pluginmanager.register(promises.Recorder())


def pytest_report_header() -> str:
    return f"torch: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --shuffle: a file's tests stay together, or its fixtures would be made for each test."""
    seed: int | None = config.getoption("shuffle")
    if seed is None:
        return
    generator = random.Random(seed)
    of_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        of_file.setdefault(item.path, []).append(item)
    files = list(of_file.values())
    generator.shuffle(files)
    for tests in files:
        generator.shuffle(tests)
    items[:] = [item for tests in files for item in tests]


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were not installed."""

    def hide(*modules: str) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: None if name in modules else find_spec(name, *a),
        )

    return hide


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """400 distinct generated documents of 40 to 160 words, with topics, hence structure."""
    generator = random.Random(0)
    topics = {
        "garden": "rose soil rain seed leaf root spade bloom hedge worm",
        "kitchen": "flour oven sugar knife butter dough plate salt spoon yeast",
        "harbour": "ship rope sail tide anchor crane gull cargo wave pier",
        "library": "book shelf page ink reader quiet index poem margin spine",
    }
    glue = "the a of and with under near from into was were old new small bright"
    documents = []
    for number in range(400):
        topic = generator.choice(list(topics))
        words = [
            generator.choice((topics[topic] if generator.random() < 0.6 else glue).split())
            for _ in range(generator.randrange(40, 160))
        ]
        documents.append(f"Note {number} from the {topic}: {' '.join(words)}.")
    return documents


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A random Llama (3 layers, width 64, 512 tokens) as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-model"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer.train_from_iterator(
        tiny_texts,
        trainers.BpeTrainer(
            vocab_size=TINY_VOCABULARY,
            special_tokens=list(special_tokens.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
    config = LlamaConfig(
        hidden_size=TINY_D_MODEL,
        intermediate_size=128,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TINY_VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        # The usual .02 leaves a random network's layers almost without effect on the residual
        # stream: layers, and errors in them, would be hard to tell apart.
        initializer_range=0.1,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_language_model(tiny_model_dir: Path) -> LanguageModel:
    """The tiny model as a HookedTransformer, float32, on the CPU. Do not modify it."""
    return load_language_model(str(tiny_model_dir), ["blocks.1.hook_resid_post"])


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_dir: Path, tiny_texts: list[str]) -> Path:
    """A recipe of ten steps on the tiny model and text."""
    corpus = tmp_path / "notes.txt"
    corpus.write_text("\n\n".join(tiny_texts))
    recipe = {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(corpus), "context_size": 32, "heldout_documents": 5},
        "hooks": ["blocks.1.hook_resid_post"],
        "sae": {"d_sae": 96, "k": 8, "prefix_sort_every": 3},
        "training": {
            "tokens": 1280,
            "batch_size_tokens": 128,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
        },
        "logging": {"every_steps": 1, "tensorboard": "off"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
