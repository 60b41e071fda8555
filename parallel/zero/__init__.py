"""DeepSpeed ZeRO: the second engine (Rajbhandari et al. 2020)."""
