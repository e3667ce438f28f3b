"""What the rewrites of a trained model do, and its loss without parts of them."""
