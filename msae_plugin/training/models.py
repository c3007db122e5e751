"""Former place of `msae_plugin.models.loading`, for scripts written for version 0.1."""

from msae_plugin.models.loading import LanguageModel, load_language_model

__all__ = ["LanguageModel", "load_language_model"]
