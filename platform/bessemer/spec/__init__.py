"""What a person writes: job files, their rules and their JSON Schema."""
