"""Models on disk: folders, safetensors files, the hub, and the original Karlo names."""
