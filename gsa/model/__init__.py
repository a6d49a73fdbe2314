"""The Hugging Face skin: configuration, model, cache. Nothing below this room knows transformers.

    from gsa.model import GSAConfig, GSAForCausalLM

Importing it registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gsa.model.cache import GSACache, Snapshot
from gsa.model.config import GSAConfig
from gsa.model.modeling import GSAForCausalLM, GSAModel

__all__ = ["GSACache", "GSAConfig", "GSAForCausalLM", "GSAModel", "Snapshot", "register_auto"]


def register_auto() -> None:
    """Makes AutoConfig, AutoModel and AutoModelForCausalLM resolve "gsa" to this package.

    Done once on import. Call it again after importing another library that claims the name "gsa"
    (flash-linear-attention does): the last to register wins.
    """
    AutoConfig.register(GSAConfig.model_type, GSAConfig, exist_ok=True)
    AutoModel.register(GSAConfig, GSAModel, exist_ok=True)
    AutoModelForCausalLM.register(GSAConfig, GSAForCausalLM, exist_ok=True)


register_auto()
