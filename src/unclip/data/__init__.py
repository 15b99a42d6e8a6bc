"""Data sets of captioned pictures: building, reading and sampling them."""
