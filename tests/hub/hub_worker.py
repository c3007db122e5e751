"""A process whose huggingface_hub is pointed at the test's Hub by environment variables.

It imports once what takes ten seconds, then forks a child for each job, so that a test can kill it,
limit its disk, or give it another token. Jobs are lines of JSON on standard input:

    {"call": "publish", "arguments": {...}, "token": "hf_..." or null, "answer": bool or null,
     "file_size_limit": bytes or null, "result": path}

The child writes what came out to `result`; the line on standard output is its process id.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file, save_file

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.hub.publish import PublishOptions, publish, report_lines
from msae_plugin.saes.download import download, fetch, local_folder
from msae_plugin.saes.find import locate


def run_snippet(snippet: str, activations: str, results: str) -> list[str]:
    """Run a model card's code as a user of the plugin does."""
    namespace: dict[str, Any] = {"activations": load_file(activations)["activations"]}
    with torch.no_grad():
        exec(snippet, namespace)
    save_file({"latents": namespace["latents"].contiguous()}, results)
    return [type(namespace["sae"]).__name__]


def perform(job: dict[str, Any], asked: list[str], said: list[str]) -> Any:
    def confirm(question: str) -> bool:
        asked.append(question)
        return bool(job["answer"])

    arguments = dict(job["arguments"])
    if job["call"] == "snippet":
        return run_snippet(**arguments)
    for name in ("run", "output", "evaluation", "report", "destination"):
        if arguments.get(name) is not None:
            arguments[name] = Path(arguments[name])
    if job["call"] == "download":
        return str(download(**arguments))
    if job["call"] == "fetch":
        return str(fetch(**arguments))
    if job["call"] == "locate":
        return [(sae.name, str(sae.source)) for sae in locate(**arguments)]
    if job["call"] == "local_folder":
        return str(local_folder(**arguments))
    run, repo = arguments.pop("run"), arguments.pop("repo")
    asking = None if job["answer"] is None else confirm
    result = publish(run, repo, PublishOptions(**arguments), confirm=asking, say=said.append)
    return {**dataclasses.asdict(result), "report": report_lines(result)}


def child(job: dict[str, Any]) -> None:
    if job["token"] is not None:
        os.environ["HF_TOKEN"] = job["token"]
    if job["file_size_limit"] is not None:
        # Beyond it a write fails as on a full disk, with an OSError.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = job["file_size_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    outcome: dict[str, Any] = {"asked": [], "said": []}
    try:
        outcome["value"] = perform(job, outcome["asked"], outcome["said"])
    except (InputError, RunFailure, KeyboardInterrupt) as error:
        outcome["error"] = type(error).__name__
        outcome["message"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    text = json.dumps(outcome, default=str)
    result = Path(job["result"])
    temporary = result.with_suffix(".part")
    temporary.write_text(text)
    temporary.rename(result)


def tell(word: object) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    # A shell without job control starts what it puts into the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    get_pretrained_saes_directory()  # two seconds of YAML, once for all children
    tell("ready")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(job)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent must not go on twice
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        tell(pid)
        os.waitpid(pid, 0)
        tell("ended")


if __name__ == "__main__":
    main()
