"""dictionary-learning's BatchTopK on the task of `throughput.py`, in its own training function."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.training import trainSAE
from inputs import read_task, report_variance
from nnsight import LanguageModel
from transformers import PreTrainedTokenizerFast

task = read_task()
# transformers 4 does not know the tokenizer's class that transformers 5 wrote.
names = json.loads((Path(task["model"]) / "tokenizer_config.json").read_text())
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=str(Path(task["model"]) / "tokenizer.json"),
    **{key: names[key] for key in ("bos_token", "eos_token", "pad_token")},
)
model = LanguageModel(
    task["model"],
    tokenizer=tokenizer,
    device_map="cpu",
    torch_dtype=torch.bfloat16,
    dispatch=True,
)
lines = (Path(task["text"]) / "train.jsonl").read_text(encoding="utf-8").splitlines()
buffer = ActivationBuffer(
    cycle(json.loads(line)["text"] for line in lines),
    model,
    model.model.layers[task["layer"]],
    d_submodule=task["d_in"],
    n_ctxs=task["buffer"],
    ctx_len=task["context"],
    refresh_batch_size=16,
    out_batch_size=task["batch"],
    device="cpu",
    remove_bos=True,
)
steps = task["tokens"] // task["batch"]
trainSAE(
    buffer,
    [
        {
            "trainer": BatchTopKTrainer,
            "steps": steps,
            "activation_dim": task["d_in"],
            "dict_size": task["d_sae"],
            "k": task["k"],
            "layer": task["layer"],
            "lm_name": "SmolLM2",
            "lr": task["lr"],
            "warmup_steps": 0,
            # Its threshold begins to be estimated at step 1,000 and is zero before.
            "threshold_start_step": min(1000, steps // 2),
            "threshold_beta": 0.9,
            "seed": task["seed"],
            "device": "cpu",
        }
    ],
    steps,
    save_dir=task["output"],
    device="cpu",
)
trained = BatchTopKSAE.from_pretrained(Path(task["output"]) / "trainer_0" / "ae.pt")
report_variance(task, trained)
