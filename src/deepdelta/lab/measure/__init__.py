"""What a model does and what it costs: operations, memory, speed, and the rewrites of a trained one."""
