"""What only saves time: without this folder PEFT scores, with the same result."""
