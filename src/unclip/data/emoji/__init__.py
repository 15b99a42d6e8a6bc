"""The emoji data set: how it is built, captioned, composed and used for evaluation."""
