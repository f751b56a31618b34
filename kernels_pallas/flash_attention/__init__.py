"""Flash attention for training, on TPU and anywhere else."""

from kernels_pallas.flash_attention.api import (
    flash_attention,
    flash_attention_with_lse,
)

__all__ = ["flash_attention", "flash_attention_with_lse"]
