"""A small multiple-choice model of our own, because no small real model answers such questions.

Small public models give one constant letter; SAEBench's unlearning evaluation keeps only questions
that are answered right in all 24 orders of the choices, and finds none.
"""

from toy_instruct.prepare import TOY_HOOK, ToyInstruct, prepare_toy_instruct
from toy_instruct.saes import ToySAERecipe, toy_activations, train_toy_sae, untrained_toy_sae
from toy_instruct.training import Recipe

__all__ = [
    "TOY_HOOK",
    "Recipe",
    "ToyInstruct",
    "ToySAERecipe",
    "prepare_toy_instruct",
    "toy_activations",
    "train_toy_sae",
    "untrained_toy_sae",
]
