"""The pictures of the documentation, drawn by softjax itself.

`python -m pictures` writes them to `docs/pictures`; a test compares the files with what this code
draws.
"""
