"""Trainings that go on: a pruned adapter that is loaded to be trained, and an allocator's state saved and put back."""
