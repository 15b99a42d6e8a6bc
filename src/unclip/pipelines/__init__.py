"""The public pipelines: text to image, and image to similar images.

Knows components, arguments and devices; knows not how a step is taken. Called by users and the command line.
"""
