"""The priors: caption -> CLIP image embedding, by diffusion or by autoregression over PCA components."""

from dalle2_fast.models.prior.autoregressive import ARPrior
from dalle2_fast.models.prior.autoregressive_network import ARPriorNetwork
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.prior.diffusion_network import DiffusionPriorNetwork
from dalle2_fast.models.prior.pca import PCA

__all__ = ["ARPrior", "ARPriorNetwork", "DiffusionPrior", "DiffusionPriorNetwork", "PCA"]
