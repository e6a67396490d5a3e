"""fastrl inside other libraries' models and trainers."""

from fastrl.integrations.router_loss import router_loss, router_loss_coef
from fastrl.integrations.transformers_models import LMHead, ModelPatch, patch_model

__all__ = ["LMHead", "ModelPatch", "patch_model", "router_loss", "router_loss_coef"]
