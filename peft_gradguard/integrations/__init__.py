"""What fits AdaLoRA into other libraries. Each module imports the library that it is named after."""
