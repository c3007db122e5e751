"""SAELens' own runner with BatchTopK on the task of `throughput.py`."""

from __future__ import annotations

from inputs import read_task, report_variance
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)

from msae_plugin.models.loading import load_language_model

task = read_task()
hook = f"blocks.{task['layer']}.hook_resid_post"
model = load_language_model(task["model"], [hook]).model
config = LanguageModelSAERunnerConfig(
    sae=BatchTopKTrainingSAEConfig(
        d_in=task["d_in"],
        d_sae=task["d_sae"],
        k=task["k"],
        # Scaling the activations would first read 1,000 batches, more than the run has.
    ),
    model_name=task["model"],
    hook_name=hook,
    dataset_path=task["text"],
    is_dataset_tokenized=False,
    streaming=False,
    context_size=task["context"],
    training_tokens=task["tokens"],
    train_batch_size_tokens=task["batch"],
    n_batches_in_buffer=task["buffer"],
    store_batch_size_prompts=16,
    lr=task["lr"],
    seed=task["seed"],
    autocast_lm=True,
    device="cpu",
    logger=LoggingConfig(log_to_wandb=False),
    output_path=task["output"],
    checkpoint_path=None,
    n_checkpoints=0,
    save_final_checkpoint=False,
)
LanguageModelSAETrainingRunner(config, override_model=model).run()
sae = SAE.load_from_disk(task["output"])
report_variance(task, sae.forward)
