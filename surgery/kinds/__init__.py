"""What is known of a module before anybody operates on it: which weights its kind drops, what their
dimensions mean, whether its forward is a product, and which weights a forward reads."""
