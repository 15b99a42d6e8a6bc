"""The public pipelines: text to image, image to similar images, and pictures of which a part is drawn anew.

Knows components, arguments and devices; knows not how a step is taken. Called by users and the command line.
"""
