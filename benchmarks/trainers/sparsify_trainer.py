"""sparsify's trainer with TopK on the task of `throughput.py`."""

from __future__ import annotations

import torch
from datasets import load_dataset
from inputs import read_task, report_variance
from sparsify import SaeConfig, TrainConfig, Trainer
from sparsify.data import chunk_and_tokenize
from transformers import AutoModelForCausalLM, AutoTokenizer

task = read_task()
tokenizer = AutoTokenizer.from_pretrained(task["model"])
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
texts = load_dataset(task["text"], split="train")
# datasets 3 cannot give torch tensors beside the newest torchvision: they are made here.
chunks = chunk_and_tokenize(
    texts, tokenizer, format="python", max_seq_len=task["context"], num_proc=1
)
rows = chunks[: task["tokens"] // task["context"]]["input_ids"]
tokens = [{"input_ids": torch.tensor(row)} for row in rows]
config = TrainConfig(
    SaeConfig(num_latents=task["d_sae"], k=task["k"]),
    batch_size=task["batch"] // task["context"],
    layers=[task["layer"]],
    init_seeds=[task["seed"]],
    save_every=10**9,
    save_dir=task["output"],
    log_to_wandb=False,
)
trainer = Trainer(config, tokens, model)
trainer.fit()
(coder,) = trainer.saes.values()
report_variance(task, lambda acts: coder(acts).sae_out)
