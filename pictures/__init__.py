"""The pictures of the documentation, drawn by softjax itself.

`python -m pictures` writes them to `docs/pictures`; a test compares what is there with what this
code draws.
"""
