"""What a framework knows that the model alone does not say: the configuration, the domain, where state is saved."""

from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.adapters.registry import adapter_of
from gradckpt_dist.adapters.uneven_inputs import follow_join

__all__ = ["Adapter", "adapter_of", "follow_join"]
