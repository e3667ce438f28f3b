"""What records say: results, factorial effects, laws over sizes."""
