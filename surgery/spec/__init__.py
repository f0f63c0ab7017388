"""What is said: options, plans, their JSON forms, and errors."""
