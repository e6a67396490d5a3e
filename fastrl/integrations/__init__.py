"""fastrl inside other libraries' models and trainers."""

from fastrl.integrations.transformers_models import LMHead, ModelPatch, patch_model

__all__ = ["LMHead", "ModelPatch", "patch_model"]
