"""Races model-serving systems on the same model, hardware and traffic, and tells the truth about the tail.

Each folder in here is a link to the one of that name at the top of the repository, so that all of it has one import name. This
module imports nothing: parts of the package run in interpreters that have none of its dependencies.
"""

__version__ = "0.1.0"
