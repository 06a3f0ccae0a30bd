"""What the user asks for: what trains, what is skipped, where the ranks went."""
