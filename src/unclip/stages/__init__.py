"""The stages (prior, decoder, super-resolution) with their conditions, and the arithmetic of embeddings and latents."""
