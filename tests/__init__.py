"""The tests, in the rooms of the package; what they share is in ``support/``. A package, so that workers find them."""
