"""The stages of unCLIP: encoders, prior, decoder, super-resolution, and what each is conditioned on.

Knows networks and conditions; knows neither how noise is removed nor what a user asked. Called by pipelines and
training.
"""
