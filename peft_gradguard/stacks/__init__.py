"""Where DeepSpeed and FSDP keep parameters and gradients elsewhere."""
