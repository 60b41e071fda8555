"""The model core: every component and every model. Pure torch, one device, no ranks."""
