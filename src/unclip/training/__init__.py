"""Training: recipes, tasks, the trainer, and the assembly of trained stages into a model."""
