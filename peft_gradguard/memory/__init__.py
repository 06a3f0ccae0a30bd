"""What outlives an allocator call: names, numbers and weak references."""
