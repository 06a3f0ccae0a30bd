"""What is read off a model: its AdaLoRA parameters, their gradients, their names. Pure: knows no allocator call."""
