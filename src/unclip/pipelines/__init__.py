"""The public pipelines: text to image, image variation, inpainting, interpolation and manipulation."""
