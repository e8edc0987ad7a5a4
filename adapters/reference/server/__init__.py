"""The reference server: standard library, and numpy where the model is. Start reading at ``__main__``.

It imports nothing of the harness, and runs as ``python -m server`` with this folder's parent on the path.
"""
