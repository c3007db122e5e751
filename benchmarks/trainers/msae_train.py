"""`msae train` on the task of `throughput.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from inputs import read_task, report_variance

import msae_plugin

task = read_task()
method = sys.argv[2]
sae = {"architecture": "batchtopk"} if method == "batchtopk" else {"preset": method}
recipe = {
    "model": {"name": task["model"], "autocast": True},
    "data": {
        "source": str(Path(task["text"]) / "train.jsonl"),
        "heldout_documents": 0,
        "context_size": task["context"],
    },
    "hooks": [f"blocks.{task['layer']}.hook_resid_post"],
    "sae": {"d_sae": task["d_sae"], "k": task["k"], "input_normalization": "first_batch", **sae},
    "training": {
        "tokens": task["tokens"],
        "batch_size_tokens": task["batch"],
        "n_batches_in_buffer": task["buffer"],
        "lr": task["lr"],
        "seed": task["seed"],
        "calibrate_batches": 8,
    },
}
msae_plugin.train(recipe, task["output"], progress=False)
loaded = msae_plugin.load(Path(task["output"]) / "sae")
report_variance(task, loaded.forward)
