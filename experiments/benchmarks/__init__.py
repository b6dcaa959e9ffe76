"""Side-by-side measurements of cost."""
