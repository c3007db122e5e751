"""What the tests of the preflight ask it."""

from typing import Any

from sae_lens import StandardSAE, StandardSAEConfig

from msae_plugin.common.errors import Problem
from msae_plugin.evaluation.preflight import preflight
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.saes.load import EvaluatedSAE

HOOK = "blocks.1.hook_resid_post"


def subject(d_in: int = 64, hook: str = HOOK) -> EvaluatedSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    return EvaluatedSAE("mine", "mine", sae, "0" * 64, "tiny-model", hook)


def find(
    evaluations: Any,
    model_name: str | None,
    *,
    sae: EvaluatedSAE | None = None,
    loader: str | None = None,
    **values: Any,
) -> list[Problem]:
    config = EvalConfig.from_dict({"evaluations": evaluations, **values})
    findings = preflight(config, [sae or subject()], model_name=model_name, loader=loader)
    for finding in findings:
        assert "\n" not in str(finding)
        assert finding.what
        assert finding.how
        assert not finding.what.endswith((".", ":", ";"))
    return findings
